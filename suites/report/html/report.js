// The page of a run: what the filter leaves of defects, matrix and checks; addresses; the keyboard.
"use strict";
(() => {
  const STEP = 100;
  const BAD = ["fail", "error", "timeout", "crash", "xpass"];
  const $ = (id) => document.getElementById(id);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const defectsOf = (check) => check.expected?.defects || [];

  let shown = run.checks;  // what the filter leaves
  let listed = 0;

  /** Fill `place` with entries of `checks`, STEP at a time. */
  function list(place, checks, upTo = STEP) {
    place.replaceChildren(...checks.slice(0, upTo).map(entries.entry));
    if (checks.length <= upTo) return;
    const more = h("button", { type: "button" }, `Show ${Math.min(STEP, checks.length - upTo)} more of ${checks.length}`);
    let at = upTo;
    more.addEventListener("click", () => {
      const next = checks.slice(at, at + STEP).map(entries.entry);
      more.before(...next);
      at += STEP;
      if (at >= checks.length) more.remove();
      else more.textContent = `Show ${Math.min(STEP, checks.length - at)} more of ${checks.length}`;
      next[0].querySelector("summary").focus();
    });
    place.append(more);
  }

  // --- what the filter leaves ---------------------------------------------------------------

  function show() {
    shown = filter.form ? filter.matching() : run.checks;
    if (filter.form) {
      $("matching").textContent = filter.active() ? `${shown.length} of ${run.checks.length} checks` : `${shown.length} checks`;
      $("clear").hidden = !filter.active();
      const chosen = all("select", filter.form).filter((one) => one.value).length;
      document.querySelector("#selects > summary").textContent = chosen ? `Filters (${chosen})` : "Filters";
      document.body.toggleAttribute("data-filtered", filter.active());
    }
    showUnexpected();
    showDefects();
    showMatrix();
    listed = STEP;
    if ($("all-checks")) list($("all-checks"), shown, listed);
  }

  function showUnexpected() {
    if (!$("unexpected")) return;
    const bad = shown.filter((check) => BAD.includes(check.verdict));
    $("unexpected").hidden = !bad.length;
    list($("unexpected-checks"), bad);
    for (const one of all("details.check", $("unexpected-checks")).slice(0, 3)) one.open = true;
  }

  function showDefects() {
    const counts = new Map();
    for (const check of shown) {
      if (check.verdict !== "xfail") continue;
      const ids = defectsOf(check);
      for (const key of ids.length ? ids : [check.expected.reason || ""]) counts.set(key, (counts.get(key) || 0) + 1);
    }
    for (const one of all("details.defect")) {
      const count = counts.get(one.dataset.defect ?? one.dataset.reason) || 0;
      one.hidden = !count;
      one.querySelector("summary .count").textContent = `${count} check${count === 1 ? "" : "s"}`;
      const place = one.querySelector(".checks");
      place.replaceChildren();
      if (one.open) fill(one);
    }
    for (const group of all("[data-group]")) {
      const left = all("details.defect", group).filter((one) => !one.hidden).length;
      group.hidden = !left;
      group.querySelector("h3 .count").textContent = left;
    }
    if ($("defects")) $("defects").hidden = !all("[data-group]").some((group) => !group.hidden);
  }

  function fill(defect) {
    const { defect: id, reason } = defect.dataset;
    const its = (check) => check.verdict === "xfail" && (id ? defectsOf(check).includes(id)
      : !defectsOf(check).length && (check.expected.reason || "") === reason);
    list(defect.querySelector(".checks"), shown.filter(its), 25);
  }

  // --- the matrix -----------------------------------------------------------------------------

  function showMatrix() {
    if (!$("matrix")) return;
    const cells = new Map();
    for (const check of shown) {
      const key = `${check.name}/${check.law}`;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(check);
    }
    close();
    for (const rows of all("tbody", $("matrix"))) {
      for (const row of all("tr[data-name]", rows)) {
        for (const cell of all("button.cell", row)) paint(cell, cells.get(`${row.dataset.name}/${cell.dataset.law}`) || [], row.dataset.name);
        row.hidden = all("button.cell", row).every((cell) => cell.disabled);
      }
      rows.hidden = all("tr[data-name]", rows).every((row) => row.hidden);
    }
    $("matrix").hidden = all("tbody", $("matrix")).every((rows) => rows.hidden);
  }

  function paint(cell, checks, name) {
    const ran = checks.filter((check) => check.verdict !== "precondition");
    const held = ran.filter((check) => check.verdict === "pass").length;
    const bad = checks.filter((check) => BAD.includes(check.verdict)).length;
    const state = !checks.length ? "empty" : bad ? "unexpected" : held < ran.length ? "known" : ran.length ? "holds" : "absent";
    cell.className = `cell is-${state}`;
    cell.disabled = !checks.length;
    const unrun = checks.length - ran.length;
    cell.textContent = state === "empty" ? "·" : state === "absent" ? "–" : state === "holds" ? `${held}` : `${held}/${ran.length}`;
    if (unrun && ran.length) cell.append(h("sup", {}, "?"));
    cell.style.setProperty("--held", ran.length ? `${100 * held / ran.length}%` : "0%");
    const told = [`${held} of ${ran.length} hold`, bad && `${bad} unexpected`, unrun && `${unrun} could not run`].filter(Boolean).join(", ");
    cell.setAttribute("aria-label", `${name}, ${cell.dataset.law}: ${told}`);
    cell.title = told;
  }

  let opened = null;
  function close() {
    if (!opened) return;
    opened.cell.setAttribute("aria-expanded", "false");
    opened.row.remove();
    opened = null;
  }

  function open(cell) {
    const again = opened?.cell === cell;
    close();
    if (again) return;
    const row = cell.closest("tr");
    const name = row.dataset.name, law = cell.dataset.law;
    const place = h("div", { class: "checks" });
    list(place, shown.filter((check) => check.name === name && check.law === law), 25);
    const under = h("tr", { class: "under" }, h("td", { colspan: row.children.length },
      h("div", { class: "panel" },
        h("div", { class: "list-head" }, h("strong", {}, h("code", {}, name), `, ${law}`),
          h("button", { type: "button", "data-link": `cell=${encodeURIComponent(`${name}/${law}`)}` }, "Copy link")),
        place)));
    row.after(under);
    cell.setAttribute("aria-expanded", "true");
    opened = { cell, row: under };
  }

  // --- addresses ------------------------------------------------------------------------------

  function go() {
    const { place, entry, words } = filter.parse(location.hash);
    if (filter.form) {
      const check = entry.check && run.checks.find((one) => one.id === entry.check);
      filter.take(words);
      if (check && !filter.matching().includes(check)) filter.take({});
    }
    show();
    if (entry.check) reveal(entry.check);
    else if (entry.cell) revealCell(entry.cell);
    else if (place) {
      const target = $(place);
      if (target instanceof HTMLDetailsElement) { target.hidden = false; unfold(target); }
      else if (target) target.scrollIntoView();
      else page.say(`This run has no ${place}`);
    }
  }

  /** Open an entry and go there, once what it holds has made the page long enough. */
  function unfold(one) {
    const arrive = () => { one.scrollIntoView(); one.firstElementChild.focus({ preventScroll: true }); };
    if (one.open) { arrive(); return; }
    one.addEventListener("toggle", arrive, { once: true });
    one.open = true;
  }

  function reveal(id) {
    const at = shown.findIndex((check) => check.id === id);
    if (at < 0) { page.say("This run has no such check"); return; }
    list($("all-checks"), shown, Math.max(STEP, at + 1));
    unfold(all("details.check", $("all-checks")).find((one) => one.dataset.check === id));
  }

  function revealCell(key) {
    const found = all("button.cell").find((cell) => `${cell.closest("tr").dataset.name}/${cell.dataset.law}` === key);
    if (!found || found.disabled) { page.say("This run has no such cell"); return; }
    open(found);
    found.closest("tr").scrollIntoView();
    found.focus({ preventScroll: true });
  }

  function changed() {
    filter.read();
    const { place } = filter.parse(location.hash);
    history.replaceState(null, "", `#${filter.asHash(place.startsWith("SP-") ? "" : place)}`);
    show();
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-link]");
    if (link) {
      history.replaceState(null, "", `#${link.dataset.link}`);
      page.copy(location.href);
    }
    const cell = event.target.closest("button.cell");
    if (cell) open(cell);
  });
  document.addEventListener("toggle", (event) => {
    const one = event.target;
    if (one.matches?.("details.defect") && one.open && !one.querySelector(".checks").childElementCount) fill(one);
  }, true);
  if (filter.form) {
    let waiting;
    filter.form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(changed, 120); });
    filter.form.addEventListener("submit", (event) => { event.preventDefault(); $("checks").scrollIntoView(); });
    filter.form.addEventListener("reset", () => setTimeout(changed));
  }
  window.addEventListener("hashchange", go);

  // --- the keyboard ---------------------------------------------------------------------------

  const heads = () => all("main summary").filter((one) => one.checkVisibility() && !one.closest(".filter"));

  function step(by) {
    const found = heads();
    const at = found.indexOf(document.activeElement.closest?.("summary") || null);
    const from = at >= 0 ? at + by : found.findIndex((one) => one.getBoundingClientRect().top > 100) - (by < 0 ? 1 : 0);
    found[Math.max(0, Math.min(found.length - 1, from))]?.focus();
  }

  function inMatrix(key) {
    const cell = document.activeElement.closest?.("button.cell");
    if (!cell) return false;
    const rows = all("tr[data-name]", $("matrix")).filter((row) => !row.hidden);
    const column = [...cell.closest("tr").children].indexOf(cell.closest("td"));
    const at = rows.indexOf(cell.closest("tr"));
    const along = key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1;
    const line = key === "ArrowLeft" || key === "ArrowRight"
      ? all("button.cell", cell.closest("tr")).filter((one) => !one.disabled)
      : rows.map((row) => row.children[column]?.querySelector("button.cell")).filter((one) => one && !one.disabled);
    line[line.indexOf(cell) + along]?.focus();
    return at >= 0;
  }

  function escape() {
    const inside = document.activeElement.closest?.("main details[open]");
    if (opened && (document.activeElement === opened.cell || opened.row.contains(document.activeElement)) && !inside) {
      opened.cell.focus();
      close();
    } else if (inside && !inside.closest(".filter")) {
      inside.open = false;
      inside.querySelector("summary").focus();
    } else if (filter.active()) filter.form.reset();
    else document.activeElement.blur();
  }

  const about = () => document.activeElement.closest?.("details.check, details.defect");
  const KEYS = {
    "/": () => { $("search")?.focus(); $("search")?.select(); },
    "?": () => $("help").showModal(),
    j: () => step(1),
    k: () => step(-1),
    c: () => about()?.querySelector(".body .copy")?.click(),
    l: () => {
      const one = about();
      if (!one) return;
      history.replaceState(null, "", `#${one.dataset.defect || `check=${encodeURIComponent(one.dataset.check)}`}`);
      page.copy(location.href);
    },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape") {
      if (event.target === $("search") && !filter.active()) $("search").blur();
      else escape();
    } else if (!typing && event.key.startsWith("Arrow")) {
      if (inMatrix(event.key)) event.preventDefault();
    } else if (!typing && event.key in KEYS) {
      event.preventDefault();
      KEYS[event.key]();
    }
  });
  $("help-button").addEventListener("click", () => $("help").showModal());

  // --- print: unexpected failures in full, the rest as it stands --------------------------------

  window.addEventListener("beforeprint", () => {
    for (const one of all("#unexpected-checks details")) one.open = true;
  });

  go();
})();
