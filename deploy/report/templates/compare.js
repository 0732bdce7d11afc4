"use strict";
(function () {
  const cards = Array.from(document.querySelectorAll("#cards [data-outcome]"));
  const list = document.getElementById("cards");
  const pick = (name) => document.getElementById(name);
  const change = (card, reward) => { const value = card.dataset["d" + reward]; return value === "" ? Infinity : Number(value); };
  const show = function () {
    const reward = pick("reward").value, order = pick("order").value, tag = pick("tag").value, outcome = pick("outcome").value;
    let shown = 0;
    const sorted = cards.map((card, index) => [card, index]);
    if (order !== "prompt") {
      const sign = order === "loss" ? 1 : -1;
      const at = function (card) { const value = change(card, reward); return value === Infinity ? Infinity : sign * value; };
      sorted.sort((a, b) => (at(a[0]) === at(b[0]) ? a[1] - b[1] : at(a[0]) - at(b[0])));
    } else {
      sorted.sort((a, b) => Number(a[0].dataset.place) - Number(b[0].dataset.place));
    }
    for (const [card] of sorted) {
      const value = change(card, reward);
      const own = value === Infinity ? "none" : value > 0 ? "win" : value < 0 ? "loss" : "tie";
      const fits = (tag === "" || card.dataset.tag === tag) && (outcome === "" || own === outcome);
      card.hidden = !fits;
      shown += fits ? 1 : 0;
      list.appendChild(card);
    }
    pick("shown").textContent = shown + " of " + cards.length;
  };
  for (const name of ["reward", "order", "tag", "outcome"]) pick(name).addEventListener("change", show);
  pick("controls").hidden = false;
  pick("shown").textContent = cards.length + " of " + cards.length;
  pick("download").addEventListener("click", function () {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([pick("numbers").textContent], { type: "application/json" }));
    link.download = "comparison.json";
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 1000);
  });
})();
