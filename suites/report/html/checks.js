// A check as an entry that unfolds: its cause, its ranks side by side, its stacks and its command.
"use strict";
const run = JSON.parse(document.getElementById("data").textContent);

/** An element; `content` are texts and elements. Texts stay texts, whatever they hold. */
function h(name, attributes, ...content) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...content.flat().filter((one) => one !== undefined && one !== null && one !== ""));
  return element;
}

const entries = (() => {
  const LONG = 12;  // lines of a stack that are shown at once

  const code = (text, what) => h("div", { class: "code" },
    h("pre", { tabindex: 0 }, text),
    h("button", { type: "button", class: "copy", "data-copy": text, "aria-label": `Copy the ${what}` }, "Copy"));

  const firstLine = (text) => (text || "").split("\n", 1)[0];

  /** The part of an id after the last folder. */
  const short = (id) => id.replace(/^.*\/(?=[^/]*\.py)/, "");

  function entry(check) {
    const line = check.clause || short(check.id);
    const hit = check.expected?.defects || [];
    const made = h("details", { class: `check is-${check.verdict}`, "data-check": check.id },
      h("summary", {},
        h("span", { class: `verdict is-${check.verdict}` }, check.verdict),
        h("span", { class: "line" }, line,
          check.verdict === "pass" || check.verdict === "xfail" ? "" : h("span", { class: "cause" }, firstLine(check.message)),
          h("span", { class: "where mono" }, check.clause ? short(check.id) : check.name || "")),
        h("span", { class: "notes" },
          check.level === "SHOULD" ? h("span", { class: "note" }, "SHOULD") : "",
          hit.map((id) => h("span", { class: "id" }, id)))));
    made.addEventListener("toggle", () => { if (made.open && !made.querySelector(".body")) made.append(body(check)); });
    return made;
  }

  /** A reason without the titles of its defects, which stand beside it as links. */
  function reasonOf(expected) {
    let left = expected.reason || "";
    for (const id of expected.defects || []) {
      left = left.replace(`${id} ${run.defects[id]?.title || ""}`, "").replace(/^; /, "");
    }
    return left;
  }

  const squeezed = (text) => (text || "").replace(/^E(?=\s)/gm, "").replace(/\s+/g, "");

  const row = (title, ...content) => [h("dt", {}, title), h("dd", {}, ...content)];

  function body(check) {
    const expected = check.expected;
    const facts = [check.name, check.law, check.world && `${check.world} rank${check.world > 1 ? "s" : ""}`,
      check.mesh && `mesh ${check.mesh}`, `${check.seconds.toFixed(2)} s`].filter(Boolean).join(" · ");
    return h("div", { class: "body" },
      h("dl", { class: "told" },
        check.message ? row(check.verdict === "precondition" ? "Not run" : "Cause", h("pre", {}, check.message)) : "",
        row("Judges", facts),
        check.level === "SHOULD" ? row("Level", `SHOULD: ${check.level_reason || ""}`) : "",
        expected ? row({ xfail: "Known as", xpass: "Expected to fail" }[check.verdict] || "Expected otherwise", (expected.defects || []).map((id) =>
            h("p", {}, h("a", { href: `#${id}` }, id), ` ${run.defects[id]?.title || "not in this catalogue"}`)),
          reasonOf(expected) ? h("p", {}, reasonOf(expected)) : "",
          expected.link ? h("p", {}, h("a", { href: expected.link, rel: "noopener" }, expected.link)) : "",
          h("p", { class: "muted" }, `by ${expected.file}`,
            expected.pattern === check.id ? "" : [", ", h("code", {}, expected.pattern)])) : "",
        check.warnings ? row("Warned", check.warnings.map((text) => h("p", {}, text))) : "",
        row("Id", h("code", {}, check.id)),
        row("Repeat", code(check.command, "command"))),
      check.ranks ? h("div", { class: "ranks", tabindex: 0, role: "region", "aria-label": "Ranks side by side" },
        check.ranks.map((one) => rank(one, check))) : "",
      h("button", { type: "button", "data-link": `check=${encodeURIComponent(check.id)}` }, "Copy link"));
  }

  function rank(one, check) {
    const places = new Set(check.ranks.map((other) => other.host)).size > 1;
    const facts = [one.phase && `in ${one.phase}`, `${one.seconds.toFixed(2)} s`,
      one.waiting_in && `waits in ${one.waiting_in}`,
      one.exitcode !== undefined && one.exitcode !== 0 && `exit ${one.exitcode}`,
      places && one.host].filter(Boolean).join(" · ");
    return h("section", { class: `rank is-${one.fate.replaceAll(" ", "-")}` },
      h("p", { class: "head" }, h("strong", {}, `rank ${one.rank}`), h("span", {}, one.fate)),
      h("p", { class: "muted" }, facts),
      one.message && !squeezed(stackOf(one, check)).includes(squeezed(one.message)) ? h("pre", {}, one.message) : "",
      one.collectives ? calls(one.collectives) : "",
      one.as !== undefined ? h("p", { class: "muted" }, `The same stack as rank ${one.as}'s.`) : "",
      one.details ? stack(one.details) : "",
      one.log ? h("p", { class: "muted" }, h("code", {}, one.log)) : "");
  }

  const stackOf = (one, check) => one.details || check.ranks.find((other) => other.rank === one.as)?.details;

  function stack(text) {
    const lines = text.trimEnd().split("\n");
    if (lines.length <= LONG) return h("pre", { class: "stack" }, lines.join("\n"));
    const before = h("details", { class: "earlier" },
      h("summary", {}, `${lines.length - LONG} lines before`),
      h("pre", { class: "stack" }, lines.slice(0, -LONG).join("\n")));
    return h("div", {}, before, h("pre", { class: "stack" }, lines.slice(-LONG).join("\n")));
  }

  function calls(several) {
    return [h("p", { class: "muted" }, "Its last collectives"),
      h("ul", { class: "calls" }, several.map((call) => h("li", {},
        h("span", { class: "mono" }, `${call.op} #${call.number}`), ` ${call.state} `,
        h("span", { class: "muted" }, `of group (${call.group.join(", ")})`, call.arguments ? `, ${call.arguments}` : "",
          `, ${call.seconds_before_the_end.toFixed(1)} s before the end`))))];
  }

  return { entry, short };
})();
