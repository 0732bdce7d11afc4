// The live page: asks for the state, exchanges the parts whose digest changed, keeps scroll position, slider and open details.
(function () {
  const EVERY_MS = 3000, LONGEST_MS = 15000;
  const bar = document.getElementById("live"), now = document.getElementById("now"), done = document.getElementById("done");
  let state = null, heard = 0, failures = 0, timer = 0, refusal = "";
  document.documentElement.style.overflowAnchor = "none"; // this script holds the place itself

  const span = function (seconds) {
    if (seconds < 90) return Math.max(0, Math.round(seconds)) + " s";
    return seconds < 5400 ? (seconds / 60).toFixed(seconds < 600 ? 1 : 0) + " min" : (seconds / 3600).toFixed(1) + " h";
  };
  const tell = function () {
    if (failures > 1 || refusal) {
      bar.dataset.state = "away";
      now.textContent = (refusal || "the server does not answer") + (heard ? "; what is shown is from " + span((performance.now() - heard) / 1000) + " ago" : "");
      return;
    }
    if (!state) return;
    const passed = (performance.now() - heard) / 1000;
    const words = [state.sentence];
    if (state.update_age_s !== null && state.state === "running") words.push("last update " + span(state.update_age_s + passed) + " ago");
    if (state.left_s !== null) words.push("about " + span(state.left_s) + " to go");
    if (state.state === "silent") words.push("no sign of life for " + span(state.status_age_s + passed));
    if (state.trouble) words.push("not refreshed: " + state.trouble);
    else if (state.is_behind) words.push("drawing what is new");
    bar.dataset.state = state.trouble ? "away" : state.state;
    now.textContent = words.join(" · ");
    if (state.share === null) done.removeAttribute("value"); else done.value = state.share;
    document.title = state.update + " · " + state.name + " · flowfleet";
  };
  const exchange = async function (name, digest) {
    const place = document.querySelector('[data-part="' + name + '"]');
    if (!place || place.dataset.digest === digest || (name === "samples" && samples.isHeld())) return;
    const answer = await fetch("/parts/" + name, { cache: "no-store" });
    if (!answer.ok) throw new Error("part " + name + ": " + answer.status);
    const fresh = place.cloneNode(false);
    fresh.innerHTML = await answer.text();
    fresh.dataset.digest = answer.headers.get("X-Digest") || digest;
    const charts = Array.from(fresh.querySelectorAll(".panels img"));
    await Promise.all(charts.map((chart) => chart.decode().catch(() => null))); // no jump while they load
    for (const open of place.querySelectorAll("details[open][id]")) {
      const twin = fresh.querySelector("#" + open.id);
      if (twin) twin.open = true;
    }
    const scrolled = Array.from(place.querySelectorAll(".scroll")).map((box) => box.scrollLeft);
    const focused = place.contains(document.activeElement) ? document.activeElement.id : "";
    const held = Array.from(document.querySelectorAll("[data-part]")).find((part) => part.getBoundingClientRect().bottom > 0);
    const isAbove = held && Boolean(place.compareDocumentPosition(held) & Node.DOCUMENT_POSITION_FOLLOWING);
    const before = isAbove ? held.getBoundingClientRect().top : 0;
    place.replaceWith(fresh);
    samples.setup(fresh);
    fresh.querySelectorAll(".scroll").forEach(function (box, at) { box.scrollLeft = scrolled[at] || 0; });
    if (focused && document.getElementById(focused)) document.getElementById(focused).focus({ preventScroll: true });
    if (isAbove) scrollBy({ top: held.getBoundingClientRect().top - before, behavior: "instant" });
  };
  const poll = async function () {
    clearTimeout(timer);
    try {
      const answer = await fetch("/api/state.json", { cache: "no-store" });
      refusal = answer.ok ? "" : (await answer.text()).trim();
      if (!answer.ok) throw new Error(refusal);
      state = await answer.json();
      heard = performance.now();
      for (const [name, digest] of Object.entries(state.parts)) await exchange(name, digest);
      failures = 0;
    } catch (error) {
      failures += 1;
    }
    tell();
    if (!document.hidden) timer = setTimeout(poll, Math.min(EVERY_MS * (1 + failures), LONGEST_MS));
  };
  document.addEventListener("visibilitychange", function () { if (!document.hidden) poll(); });
  setInterval(tell, 1000);
  poll();
})();
