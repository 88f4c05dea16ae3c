// Compares any two runs, as report/changes.py does: only checks that ran in both count.
"use strict";

const HOW = "pfch";  // holds, fails, crashes, hangs: better before worse
const WORDS = { p: "holds", f: "fails", c: "crashes", h: "hangs" };

// What a run shows that the other does not; `data` as website/comparison.py makes it.
function compare(data, one, other) {
  const [old, now] = [one, other].map((run) => data.letters[run.letters]);
  const [metOld, metNow] = [one, other].map((run) => data.defects[run.defects]);
  const common = [], only = [[], []];
  data.checks.forEach((id, n) => {
    const [was, is] = [old[n], now[n]].map((letter) => letter !== " " && letter !== "-");
    if (was && is) common.push(n);
    else if (was || is) only[was ? 0 : 1].push(n);
  });
  const ran = new Set(common);
  const holds = (letters, n) => letters[n] === "p";
  const within = (met) => Object.fromEntries(Object.entries(met)
    .map(([id, places]) => [id, places.filter((n) => ran.has(n))]).filter(([, places]) => places.length));
  const [before, after] = [within(metOld), within(metNow)];
  const alone = (mine, others, letters) => Object.entries(mine)
    .filter(([id]) => !(id in others))
    .map(([id, places]) => [id, places.filter((n) => holds(letters, n))])
    .filter(([, places]) => places.length);
  const named = (met) => new Set(Object.values(met).flat());
  const [namedOld, namedNow] = [named(before), named(after)];
  const how = (letters, n) => HOW.indexOf(letters[n].toLowerCase());
  const changed = common.filter((n) => how(old, n) !== how(now, n));
  const unnamed = (n) => !namedOld.has(n) && !namedNow.has(n);
  const unexpected = (n) => now[n] !== now[n].toLowerCase();
  const ways = {};
  for (const [id, places] of Object.entries(after))
    for (const n of places) ways[n] = (ways[n] || "") + data.ways[id];
  const varies = (n) => [old, now].every((letters) => ways[n].includes(letters[n].toLowerCase()));
  const both = changed.filter((n) => namedOld.has(n) && namedNow.has(n));
  const known = both.filter((n) => !varies(n));
  return {
    common: common.length, only, old, now,
    varied: both.filter(varies),
    appeared: alone(after, before, old),
    vanished: alone(before, after, now),
    renamed: Object.entries(after).filter(([id, places]) => !(id in before) && places.every((n) => !holds(old, n))),
    failures: [...changed.filter((n) => unnamed(n) && holds(old, n)),
               ...common.filter((n) => namedOld.has(n) && unexpected(n))],
    mended: changed.filter((n) => unnamed(n) && holds(now, n)),
    worse: known.filter((n) => how(now, n) > how(old, n)),
    better: known.filter((n) => how(now, n) < how(old, n)),
  };
}

if (typeof module !== "undefined") module.exports = { compare };
else (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const [before, now] = [find("before"), find("now")];
  const bySlug = new Map(data.runs.map((run) => [run.run, run]));
  for (const box of [before, now])
    for (const run of data.runs) box.append(new Option(`${run.title}  (${run.commit.slice(0, 9)})`, run.run));

  function make(name, text, ...inside) {
    const made = document.createElement(name);
    if (text) made.textContent = text;
    made.append(...inside);
    return made;
  }
  const several = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
  const list = (places, tell) => make("ul", "", ...places.map((n) => make("li", "", ...tell(n))));

  const order = Object.keys(data.titles);
  const rank = ([id]) => order.includes(id) ? order.indexOf(id) : order.length;

  function defects(title, found) {
    if (!found.length) return [];
    found.sort((a, b) => rank(a) - rank(b));
    const rows = found.map(([id, places]) => {
      const [severity, text] = data.titles[id] || ["", "which this catalogue does not have"];
      return make("details", "", make("summary", `${severity} ${id}  ${text} (${several(places.length, "check")})`),
                  list(places, (n) => [make("code", data.checks[n])]));
    });
    return [make("section", "", make("h2", `${title}: ${several(found.length, "defect")}`), ...rows)];
  }
  function checks(title, places, found) {
    if (!places.length) return [];
    const tell = (n) => [`${WORDS[found.old[n].toLowerCase()]} → ${WORDS[found.now[n].toLowerCase()]}  `, make("code", data.checks[n])];
    return [make("section", "", make("h2", `${title}: ${several(places.length, "check")}`), list(places, tell))];
  }

  function show() {
    const [one, other] = [bySlug.get(before.value), bySlug.get(now.value)];
    const found = compare(data, one, other);
    const worse = found.appeared.length || found.failures.length || found.worse.length;
    const better = found.vanished.length || found.mended.length || found.better.length;
    find("answer").textContent = !found.common ? "No check ran in both"
      : worse ? "Something got worse" : better ? "Nothing got worse, something got better" : "Nothing changed";
    const mixed = one.commit !== other.commit || /dirty$/.test(one.commit);
    find("commits").hidden = !mixed || one === other;
    find("commits").textContent = `The runs are of two commits of the suites, ${one.commit.slice(0, 12)} and ${other.commit.slice(0, 12)}: what differs may be the suites’ doing.`;
    find("counted").textContent = `${several(found.common, "check")} ran in both.`;
    const alone = [one, other].flatMap((run, side) => found.only[side].length
      ? [make("details", "", make("summary", `In ${run.title} only, and not counted: ${several(found.only[side].length, "check")}`),
              list(found.only[side], (n) => [make("code", data.checks[n])]))] : []);
    find("changes").replaceChildren(
      ...defects("New", found.appeared), ...defects("Gone", found.vanished),
      ...checks("Now failing, without a defect", found.failures, found),
      ...checks("Now holding, without a defect", found.mended, found),
      ...checks("Worse", found.worse, found),
      ...checks("Better, and still failing", found.better, found),
      ...checks("Failing in another of the ways that their defect names", found.varied, found),
      ...defects("Met now by checks that failed before, too", found.renamed), ...alone);
    document.title = `shardproof: ${one.title} → ${other.title}`;
  }
  function choose() {
    const [a, b] = decodeURIComponent(location.hash.slice(1)).split("..");
    now.value = bySlug.has(b) ? b : data.runs[0].run;
    before.value = bySlug.has(a) ? a : (data.runs[1] || data.runs[0]).run;
    show();
  }
  function chosen() {
    history.replaceState(null, "", `#${before.value}..${now.value}`);
    show();
  }
  before.addEventListener("change", chosen);
  now.addEventListener("change", chosen);
  find("swap").addEventListener("click", () => {
    [before.value, now.value] = [now.value, before.value];
    chosen();
  });
  addEventListener("hashchange", choose);
  choose();
})();
