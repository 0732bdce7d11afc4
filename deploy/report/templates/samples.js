"use strict";
// The samples' slider: the base model beside the chosen version, kept while the section is exchanged, named in the address (#update=25).
const samples = (function () {
  const all = (query) => Array.from(document.querySelectorAll(query));
  const pick = (name) => document.getElementById(name);
  const named = function () {
    const found = /^#update=(\d+)$/.exec(location.hash);
    return found ? found[1] : null;
  };
  let chosen = named(); // a version, or null: follow the newest
  let timer = 0;
  const columns = () => all(".over th[data-column]");
  const smooth = function (image) { // small images keep square pixels, larger ones are photographs
    const settle = function () { image.classList.toggle("pixel", image.naturalWidth <= 96); };
    if (image.complete && image.naturalWidth) settle(); else image.addEventListener("load", settle, { once: true });
    image.addEventListener("error", function () {
      const gone = document.createElement("div");
      gone.className = "shot gone";
      gone.textContent = "not kept";
      image.replaceWith(gone);
    }, { once: true });
  };
  const show = function (at) {
    const titles = columns();
    const slider = pick("slider");
    if (Number(slider.value) !== at) slider.value = at;
    pick("where").textContent = titles[at].textContent;
    for (const side of all("#pairs [data-row]")) {
      const cell = document.querySelector('[data-cell="' + side.dataset.row + "-" + at + '"]');
      const shot = cell.querySelector(".shot").cloneNode(true);
      shot.removeAttribute("loading");
      side.querySelector("small").textContent = titles[at].textContent;
      side.querySelector(".shot").replaceWith(shot);
      side.lastElementChild.replaceWith(cell.querySelector(".badges").cloneNode(true));
      if (shot.tagName === "IMG") smooth(shot);
    }
    for (const cell of all(".over [data-column]")) cell.classList.toggle("on", cell.dataset.column === String(at));
    for (const near of [at - 1, at + 1]) { // asked for before they are needed
      for (const image of all('.over td[data-column="' + near + '"] img')) new Image().src = image.src;
    }
  };
  const place = function () { // a version that is no longer there: the newest
    const titles = columns();
    const found = titles.findIndex((cell) => cell.dataset.version === chosen);
    show(found < 0 ? titles.length - 1 : found);
  };
  const stop = function () {
    clearInterval(timer);
    timer = 0;
    if (pick("play")) pick("play").textContent = "Play";
  };
  const move = function (at) {
    const titles = columns();
    const last = titles.length - 1;
    const to = Math.min(Math.max(at, 0), last);
    chosen = to === last ? null : titles[to].dataset.version;
    history.replaceState(null, "", chosen === null ? location.pathname + location.search : "#update=" + chosen);
    show(to);
  };
  const position = () => Number(pick("slider").value);
  const play = function () {
    if (timer) { stop(); return; }
    pick("play").textContent = "Stop";
    if (position() === columns().length - 1) move(0);
    timer = setInterval(function () {
      if (!pick("slider") || position() === columns().length - 1) { stop(); return; }
      move(position() + 1);
    }, 900);
  };
  let isHeld = false; // by a pointer
  const setup = function (root) {
    root.querySelectorAll("img.shot").forEach(smooth);
    const slider = root.querySelector("#slider");
    if (!slider) return;
    pick("play").addEventListener("click", play);
    if (timer) pick("play").textContent = "Stop";
    slider.addEventListener("input", function () { stop(); move(position()); });
    slider.addEventListener("pointerdown", function () { isHeld = true; });
    pick("controls").hidden = false;
    pick("pairs").hidden = false;
    place();
  };
  for (const name of ["pointerup", "pointercancel"]) addEventListener(name, function () { isHeld = false; });
  document.addEventListener("keydown", function (event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const pairs = pick("pairs");
    if (!step || !pairs || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.target.closest("input, select, textarea") && event.target.id !== "slider") return;
    const box = pairs.getBoundingClientRect();
    if (event.target.id !== "slider" && (box.bottom < 0 || box.top > innerHeight)) return;
    event.preventDefault();
    stop();
    move(position() + step);
  });
  addEventListener("hashchange", function () { chosen = named(); if (pick("slider")) place(); });
  setup(document);
  return { setup: setup, isHeld: () => isHeld };
})();
