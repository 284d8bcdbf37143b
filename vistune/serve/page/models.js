// Which model is asked: the server's list, asked for again whenever somebody is about to choose from it.
import * as server from "./server.js";
import { word } from "./words.js";

const KEPT = "vistune.model";
const list = document.getElementById("model");
let contexts = {};

/** The chosen name; "" while there is none. */
export const model = () => list.value;

/** Tokens that its prompt and answer may have together, as far as is known. */
export const context = () => contexts[list.value] || Infinity;

function wanted() {
  const asked = new URLSearchParams(location.search).get("model");
  try {
    return sessionStorage.getItem(KEPT) || asked || "";
  } catch (error) {
    console.info("no storage:", error.name);
    return asked || "";
  }
}

/** The server's names, as they are now. A chosen one stays chosen; when it has gone, a notice is given back. */
export async function reload() {
  const found = await server.models();
  const names = found.map((one) => one.id);
  contexts = Object.fromEntries(found.map((one) => [one.id, one.context]));
  const before = list.value || wanted();
  const same = names.length === list.options.length && names.every((name, place) => list.options[place].value === name);
  list.disabled = !names.length;
  if (!same) list.replaceChildren(...(names.length ? names : [""]).map((name) => new Option(name || word("no_model"), name)));
  if (names.includes(before)) list.value = before;
  list.title = list.value;
  if (!names.length) return word("no_models");
  return before && !names.includes(before) ? word("gone_model", { model: before, now: list.value }) : "";
}

list.addEventListener("change", () => {
  list.title = list.value;
  try {
    sessionStorage.setItem(KEPT, list.value);
  } catch (error) {
    console.info("not kept:", error.name);
  }
});
