// Benchmarks: torch, the reference and the floor on one axis, and their cost over the world's size.
"use strict";
(() => {
  const { rows } = run.benchmarks;
  const ARMS = ["torch", "reference", "floor"];
  const COLOURS = { domain: ARMS, range: ARMS.map((arm) => `var(--arm-${arm})`) };
  const SYMBOLS = { domain: ARMS, range: ["circle", "diamond", "times"] };
  const ROOM = 24;  // pixels of a row

  const title = (row) => `${row.title}, ${row.regime}, ${row.ranks} rank${row.ranks > 1 ? "s" : ""}`;
  function seconds(value) {
    const [scale, unit] = value >= 1 ? [1, "s"] : value >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"];
    return `${Number((value * scale).toPrecision(3))} ${unit}`;
  }
  const bytes = (value) => value >= 2 ** 20 ? `${(value / 2 ** 20).toFixed(1)} MiB` : value >= 1024 ? `${(value / 1024).toFixed(1)} KiB` : `${value} B`;

  /** Ticks of a logarithmic axis: powers of ten, or 1, 2 and 5 where there are few. */
  function ticks(several) {
    const [low, high] = d3.extent(several, (one) => one.seconds);
    const powers = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1);
    const inside = (steps) => powers.flatMap((power) => steps.map((step) => step * 10 ** power)).filter((value) => value >= low && value <= high);
    return inside([1]).length > 1 ? inside([1]) : inside([1, 2, 5]);
  }

  const points = rows.flatMap((row) => ARMS.filter((arm) => row.arms[arm]?.seconds)
    .map((arm) => ({ ...row, label: title(row), arm, seconds: row.arms[arm].seconds })));

  function sideBySide(width) {
    const narrow = width < 600;
    const spans = d3.groups(points, (one) => one.label)
      .map(([label, several]) => ({ label, from: d3.min(several, (one) => one.seconds), to: d3.max(several, (one) => one.seconds) }));
    return Plot.plot({
      width, height: spans.length * (narrow ? 30 : ROOM) + 70, marginLeft: narrow ? 12 : 16 + 6.1 * d3.max(spans, (one) => one.label.length), marginRight: 24, marginTop: narrow ? 46 : 34,
      x: { type: "log", axis: "top", grid: true, label: null, tickFormat: seconds, ticks: ticks(points), tickSize: 0 },
      y: { domain: spans.map((one) => one.label), label: null, axis: narrow ? null : "left", tickSize: 0 },
      color: COLOURS, symbol: SYMBOLS,
      marks: [
        Plot.ruleY(spans, { y: "label", x1: "from", x2: "to", stroke: "var(--line)", strokeWidth: 3 }),
        narrow ? Plot.text(spans, { y: "label", text: "label", frameAnchor: "left", dy: -10, fontSize: 10, fill: "var(--muted)" }) : null,
        Plot.dot(points, { y: "label", x: "seconds", stroke: "arm", fill: (one) => one.arm, fillOpacity: 0.25, symbol: "arm", r: 4, strokeWidth: 2,
          title: (one) => `${one.label}\n${one.arm}: ${seconds(one.seconds)}` }),
      ],
    });
  }

  function overRanks(several, width) {
    return Plot.plot({
      width, height: 150, marginLeft: 52, marginBottom: 28, marginTop: 12,
      x: { type: "point", label: null, tickSize: 0 }, color: COLOURS, symbol: SYMBOLS,
      y: { type: "log", grid: true, label: null, tickFormat: seconds, ticks: ticks(several), tickSize: 0 },
      marks: [
        Plot.line(several, { x: "ranks", y: "seconds", stroke: "arm", strokeWidth: 1.75 }),
        Plot.dot(several, { x: "ranks", y: "seconds", stroke: "arm", symbol: "arm", r: 3.5, title: (one) => `${one.arm}, ${one.ranks} ranks: ${seconds(one.seconds)}` }),
      ],
    });
  }

  function table() {
    const cell = (row, name, shown) => h("td", {}, ["torch", "reference"].map((arm) => row.arms[arm]?.[name]).map((value) => value === undefined ? "–" : shown(value)).join(" / "));
    return h("table", { class: "numbers" },
      h("thead", {}, h("tr", {}, h("td"), [...ARMS, "collectives", "received", "peak"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.map((row) => h("tr", {},
        h("th", { scope: "row" }, title(row)),
        ARMS.map((arm) => h("td", {}, row.arms[arm]?.wrong ? `wrong: ${row.arms[arm].wrong}` : row.arms[arm]?.seconds ? seconds(row.arms[arm].seconds) : "–")),
        cell(row, "collectives", String), cell(row, "received", bytes), cell(row, "peak", bytes)))));
  }

  function draw() {
    const wide = document.getElementById("side-by-side");
    wide.replaceChildren(sideBySide(wide.clientWidth));  // who cannot see it reads the table
    const sizes = d3.groups(points, (one) => `${one.title}, ${one.regime}`)
      .filter(([, several]) => new Set(several.map((one) => one.ranks)).size > 1);
    document.getElementById("over-ranks").hidden = !sizes.length;
    const grid = document.querySelector("#over-ranks .charts");
    grid.replaceChildren(...sizes.map(([, several]) => h("figure", {}, h("figcaption", {}, h("code", {}, several[0].title), ` ${several[0].regime}`), overRanks(several, 268))));
  }

  document.getElementById("numbers").append(table());
  let width = 0;
  new ResizeObserver(() => {
    const now = document.getElementById("side-by-side").clientWidth;
    if (now !== width) { width = now; draw(); }
  }).observe(document.getElementById("side-by-side"));
})();
