// Which checks are shown: the words of the filter, in the form and in the address of the page.
"use strict";
const filter = (() => {
  const form = document.getElementById("filter");
  const names = form ? [...form.elements].map((one) => one.name).filter(Boolean) : [];
  const of = (check) => check.expected?.defects || [];
  const roadsOf = (check) => of(check).flatMap((id) => run.defects[id]?.roads || []);
  const severitiesOf = (check) => of(check).flatMap((id) => run.defects[id]?.severity || []);
  const TESTS = {
    function: (check, word) => check.name === word,
    law: (check, word) => check.law === word,
    verdict: (check, word) => check.verdict === word,
    level: (check, word) => (check.level || "MUST") === word,
    severity: (check, word) => severitiesOf(check).includes(word),
    road: (check, word) => roadsOf(check).includes(word),
  };

  const texts = new Map();  // of a check, in small letters; made when somebody searches
  function text(check) {
    if (!texts.has(check)) {
      texts.set(check, [check.id, check.clause, check.message, check.name, check.law, ...of(check),
        ...of(check).map((id) => run.defects[id]?.title), check.expected?.reason,
        ...(check.ranks || []).flatMap((rank) => [rank.message, rank.details, rank.fate, rank.waiting_in])]
        .filter(Boolean).join("\n").toLowerCase());
    }
    return texts.get(check);
  }

  let words = {};

  /** The address without its "#": an element or an entry, and the words of the filter. */
  function parse(hash) {
    const found = { place: "", entry: {}, words: {} };
    for (const part of hash.replace(/^#/, "").split("&").filter(Boolean)) {
      const [key, ...rest] = part.split("=");
      let value;
      try { value = decodeURIComponent(rest.join("=")); } catch { continue; }
      if (!rest.length) found.place = key;
      else if (key === "check" || key === "cell") found.entry[key] = value;
      else if (names.includes(key) && value) found.words[key] = value;
    }
    return found;
  }

  const asHash = (place, more = words) =>
    [place, ...Object.entries(more).map(([key, value]) => `${key}=${encodeURIComponent(value)}`)].filter(Boolean).join("&");

  function take(more) {
    words = more;
    for (const name of names) form.elements[name].value = words[name] || "";
    const unknown = names.find((name) => form.elements[name].value !== (words[name] || ""));
    if (unknown) {  // an address of another run
      const { [unknown]: lost, ...rest } = words;
      take(rest);
    }
  }

  function read() {
    words = Object.fromEntries(names.map((name) => [name, form.elements[name].value.trim()]).filter(([, value]) => value));
  }

  function matching() {
    const searched = (words.q || "").toLowerCase().split(/\s+/).filter(Boolean);
    const tests = Object.entries(words).filter(([name]) => name in TESTS);
    return run.checks.filter((check) => tests.every(([name, word]) => TESTS[name](check, word))
      && (!searched.length || searched.every((one) => text(check).includes(one))));
  }

  return { form, parse, asHash, take, read, matching, active: () => Object.keys(words).length > 0 };
})();
