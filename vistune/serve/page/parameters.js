// How an answer is asked for: the sliders, the seed, the system text. Begins with what LLaVA's demo begins with.
const BEGIN = { temperature: 0.2, top_p: 0.7, max_tokens: 512, seed: null, system: "" };
const KEPT = "vistune.parameters";
const SLIDERS = ["temperature", "top_p", "max_tokens"];
const find = (id) => document.getElementById(id);
let now = { ...BEGIN };
let most = Infinity;

/** The most tokens that an answer may have. What was chosen stays chosen for a model that allows it. */
export function allow(newTokens) {
  most = newTokens;
  find("max_tokens-number").max = most;
  find("max_tokens").max = Math.min(1024, most);
  show();
}

export function bind() {
  try {
    now = { ...BEGIN, ...JSON.parse(sessionStorage.getItem(KEPT) || "{}") };
  } catch (error) {
    console.info("nothing kept:", error.name);
  }
  for (const name of SLIDERS) {
    find(name).addEventListener("input", () => set(name, Number(find(name).value)));
    find(`${name}-number`).addEventListener("change", () => set(name, bounded(find(`${name}-number`), BEGIN[name])));
  }
  find("seed").addEventListener("input", () => set("seed", seedOf(find("seed").value)));
  find("system").addEventListener("input", () => set("system", find("system").value));
  find("reset").addEventListener("click", () => { now = { ...BEGIN }; show(); keep(); });
  show();
}

function bounded(field, otherwise) {
  const value = field.value === "" ? otherwise : Number(field.value);
  return Math.min(Number(field.max), Math.max(Number(field.min), value));
}

/** A whole number that this page can say exactly, or none. */
function seedOf(text) {
  const value = /^-?\d+$/.test(text.trim()) ? Number(text) : NaN;
  return Number.isSafeInteger(value) ? value : null;
}

function set(name, value) {
  now[name] = value;
  show();
  keep();
}

function show() {
  for (const name of SLIDERS) {
    const value = name === "max_tokens" ? Math.min(now[name], most) : now[name];
    find(name).value = value;
    find(`${name}-number`).value = value;
  }
  const seed = find("seed");
  if (document.activeElement !== seed) seed.value = now.seed ?? "";
  seed.setAttribute("aria-invalid", String(Boolean(seed.value.trim()) && now.seed === null));
  if (find("system").value !== now.system) find("system").value = now.system;
}

function keep() {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(now));
  } catch (error) {
    console.info("not kept:", error.name);
  }
}

/** As they are now: {temperature, top_p, max_tokens, seed, system}; null is for the server to choose. */
export function parameters() {
  return { ...now, max_tokens: Math.min(now.max_tokens, most) || null };
}
