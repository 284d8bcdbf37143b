// The page's words in the reader's language. Knows nothing of what they are for.
import en from "./en.js";
import zh from "./zh.js";

const TABLES = { en, zh };
const KEPT = "vistune.language";
let language = begun();

/** What was chosen here before, else the first of the browser's languages that there is a table for. */
function begun() {
  let chosen = null;
  try {
    chosen = localStorage.getItem(KEPT);
  } catch (error) {
    console.info("no storage:", error.name);
  }
  const wanted = [chosen, ...(navigator.languages || [navigator.language])].filter(Boolean);
  return wanted.map((one) => one.slice(0, 2).toLowerCase()).find((one) => one in TABLES) || "en";
}

/** A sentence with its values: word("tokens", {n: 3}). */
export function word(name, values = {}) {
  return (TABLES[language][name] ?? name).replace(/\{(\w+)\}/g, (whole, key) => (key in values ? String(values[key]) : whole));
}

/** A number as the reader writes it. */
export function number(value, digits = 0) {
  return value.toLocaleString(language, { maximumFractionDigits: digits });
}

export function bytes(value) {
  const place = value >= 1 << 20 ? 20 : 10;
  return `${number(value / 2 ** place, 1)} ${place === 20 ? "MiB" : "KiB"}`;
}

/** Every `data-word` and the like under a node, in the reader's language. */
export function fill(node = document) {
  for (const [data, set] of Object.entries(PLACES)) {
    for (const one of node.querySelectorAll(`[data-${data}]`)) set(one, word(one.dataset[data]));
  }
  if (node === document) document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
}

const PLACES = {
  word: (node, text) => { node.textContent = text; },
  label: (node, text) => node.setAttribute("aria-label", text),
  placeholder: (node, text) => { node.placeholder = text; },
  title: (node, text) => {
    node.title = text;
    if (!node.querySelector("[data-word]") && !node.dataset.word) node.setAttribute("aria-label", text);
  },
};

/** The other language from now on. */
export function turn() {
  language = Object.keys(TABLES).find((one) => one !== language);
  try {
    localStorage.setItem(KEPT, language);
  } catch (error) {
    console.info("no storage:", error.name);
  }
  fill();
}
