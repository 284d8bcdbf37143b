// Where a question is written: its text, its pictures (chosen, dropped, pasted, taken by camera). Knows nothing of answers.
import { forget, read, roomOf } from "./pictures.js";
import { thumbs } from "./view.js";
import { word } from "./words.js";

const find = (id) => document.getElementById(id);
const text = find("text");
const coarse = matchMedia("(pointer: coarse)");
let bound = { limits: () => null, others: () => [], changed: () => {}, notice: () => {} };

export const draft = { text: "", pictures: [] };

/** `limits()` of the server; `others()`: pictures of the conversation; `changed()`; `notice(text)`; `submit()`. */
export function bind(calls) {
  bound = calls;
  text.enterKeyHint = coarse.matches ? "enter" : "send"; // a finger has no Shift+Enter for a new line
  text.addEventListener("input", () => { draft.text = text.value; fit(); calls.changed(); });
  text.addEventListener("keydown", (event) => {
    const alone = event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
    if (!alone || (coarse.matches && !event.ctrlKey && !event.metaKey)) return;
    event.preventDefault();
    calls.submit();
  });
  find("ask").addEventListener("submit", (event) => { event.preventDefault(); calls.submit(); });
  for (const [button, field] of [["choose", "files"], ["camera", "shot"]]) {
    find(button).addEventListener("click", () => find(field).click());
    find(field).addEventListener("change", async () => {
      const chosen = [...find(field).files];
      find(field).value = "";
      await add(chosen);
    });
  }
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    add(files);
  });
  bindDrop();
}

function bindDrop() {
  const carries = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  const over = (on) => { find("drop").hidden = !on; };
  let inside = 0;
  addEventListener("dragenter", (event) => { if (carries(event)) { inside++; over(true); } });
  addEventListener("dragleave", (event) => { if (carries(event) && --inside <= 0) { inside = 0; over(false); } });
  addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
  addEventListener("drop", (event) => {
    inside = 0;
    over(false);
    if (!carries(event)) return;
    event.preventDefault();
    add([...event.dataTransfer.files]);
  });
}

let adding = Promise.resolve();

/** Add files as pictures, one after the other; what was done to them, or why one is not there, is told. */
export function add(files) {
  adding = adding.then(() => addAll(files));
  return adding;
}

async function addAll(files) {
  const told = [];
  const limits = await bound.limits();
  for (const file of files) {
    const all = [...bound.others(), ...draft.pictures];
    if (all.length >= limits.pictures) {
      told.push(word("too_many", { n: limits.pictures }));
      break;
    }
    try {
      const { made, notice } = await read(file, limits, roomOf(limits) - all.reduce((sum, one) => sum + one.nbytes, 0));
      draft.pictures.push(made);
      if (notice) told.push(notice);
    } catch (error) {
      told.push(error.message);
    }
  }
  bound.notice(told.join(" "));
  show();
  bound.changed();
}

/** Pictures that are being read are there when this is done. */
export const settled = () => adding;

function remove(one) {
  draft.pictures = draft.pictures.filter((other) => other !== one);
  if (!bound.others().includes(one)) forget(one);
  show();
  bound.changed();
  text.focus();
}

export function show() {
  thumbs(find("thumbs"), draft.pictures, remove);
  if (text.value !== draft.text) text.value = draft.text;
  fit();
}

/** Put this in, instead of what is there. */
export function set({ text: words, pictures }) {
  Object.assign(draft, { text: words, pictures: [...pictures] });
  show();
}

/** As high as its text, up to what the sheet allows. */
function fit() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

export function focus() {
  if (!coarse.matches) text.focus();
}
