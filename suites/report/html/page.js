// What every page does: the theme, copy buttons, and short notes to the reader.
"use strict";
const page = (() => {
  const themes = { system: ["as the system", "◐"], light: ["light", "○"], dark: ["dark", "●"] };
  // A page of a file may be kept from storing anything: then the choice lasts as long as the page.
  const stored = { get() { try { return localStorage.getItem("shardproof-theme"); } catch { return null; } },
                   set(word) { try { localStorage.setItem("shardproof-theme", word); } catch { /* see above */ } } };
  let theme = stored.get() in themes ? stored.get() : "system";
  const button = document.getElementById("theme");

  function show() {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const [word, sign] = themes[theme];
    button.title = `Theme: ${word}`;
    button.setAttribute("aria-label", button.title);
    button.firstElementChild.textContent = sign;
  }

  function say(text) {
    const place = document.getElementById("said");
    place.textContent = text;
    place.classList.add("shown");
    clearTimeout(say.timer);
    say.timer = setTimeout(() => place.classList.remove("shown"), 1600);
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // no permission, or no clipboard: as on a page of a file in some browsers
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    say("Copied");
  }

  show();
  button.addEventListener("click", () => {
    const words = Object.keys(themes);
    theme = words[(words.indexOf(theme) + 1) % words.length];
    stored.set(theme);
    show();
  });
  document.addEventListener("click", (event) => {
    const asked = event.target.closest("[data-copy]");
    if (asked) copy(asked.dataset.copy);
  });
  return { say, copy };
})();
