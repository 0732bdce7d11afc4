"use strict";
(function () {
  const all = (query) => Array.from(document.querySelectorAll(query));
  const slider = document.getElementById("slider");
  if (slider) {
    const titles = all(".over th[data-column]").map((cell) => cell.textContent);
    const show = function () {
      const at = slider.value;
      document.getElementById("where").textContent = titles[at];
      for (const side of all("#pairs [data-row]")) {
        const cell = document.querySelector('[data-cell="' + side.dataset.row + "-" + at + '"]');
        side.querySelector("small").textContent = titles[at];
        side.querySelector(".shot").replaceWith(cell.querySelector(".shot").cloneNode(true));
        side.lastElementChild.replaceWith(cell.querySelector(".badges").cloneNode(true));
      }
      for (const cell of all(".over [data-column]")) cell.classList.toggle("on", cell.dataset.column === at);
    };
    let timer = 0;
    const play = document.getElementById("play");
    const stop = function () { clearInterval(timer); timer = 0; play.textContent = "Play"; };
    play.addEventListener("click", function () {
      if (timer) { stop(); return; }
      play.textContent = "Stop";
      slider.value = slider.value === slider.max ? 0 : slider.value;
      show();
      timer = setInterval(function () {
        if (slider.value === slider.max) { stop(); return; }
        slider.value = Number(slider.value) + 1;
        show();
      }, 900);
    });
    slider.addEventListener("input", function () { stop(); show(); });
    document.getElementById("controls").hidden = false;
    document.getElementById("pairs").hidden = false;
    show();
  }
  const download = document.getElementById("download");
  download.hidden = false;
  download.addEventListener("click", function () {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("numbers").textContent], { type: "application/json" }));
    link.download = "numbers.json";
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 1000);
  });
})();
