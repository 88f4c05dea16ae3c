// The comparison of two runs: each check unfolds to what it was before, and what it is now.
"use strict";
(() => {
  const byId = (checks) => new Map(checks.map((check) => [check.id, check]));
  const before = byId(run.before), now = byId(run.checks);

  const side = (name, check) => h("section", {}, h("h4", {}, name), check ? entries.entry(check) : "did not run");

  function sides(id) {
    const made = h("div", { class: "pair-body" }, side(run.names[0], before.get(id)), side(run.names[1], now.get(id)));
    for (const one of made.querySelectorAll("details.check")) one.open = true;
    return made;
  }

  function pair(id) {
    const made = h("details", { class: "pair", "data-pair": id },
      h("summary", {},
        h("span", { class: "turn" }, `${before.get(id)?.verdict} → ${now.get(id)?.verdict}`),
        h("span", { class: "line" }, now.get(id)?.clause || entries.short(id), h("span", { class: "where mono" }, entries.short(id)))));
    return made;
  }

  document.addEventListener("toggle", (event) => {
    const one = event.target;
    if (!one.open) return;
    if (one.matches("details.pair") && !one.querySelector(".pair-body")) one.append(sides(one.dataset.pair));
    const place = one.matches("details.defect") && one.querySelector(".checks");
    if (place && !place.childElementCount) place.append(...run.of_defect[one.dataset.defect].map(pair));
  }, true);

  function go() {
    const place = document.getElementById(location.hash.slice(1));
    if (place instanceof HTMLDetailsElement) place.open = true;
    place?.scrollIntoView();
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-link]");
    if (!link) return;
    history.replaceState(null, "", `#${link.dataset.link}`);
    page.copy(location.href);
  });
  window.addEventListener("hashchange", go);
  go();
})();
