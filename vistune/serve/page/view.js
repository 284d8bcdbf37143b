// A conversation's turns drawn. Knows nothing of the server: what is pressed goes to the calls it was given.
import { rendered } from "./rendered.js";
import { fill, number, word } from "./words.js";

const find = (id) => document.getElementById(id);

/** Thumbnails into a list. `remove(picture)` where they can be taken away again. */
export function thumbs(list, pictures, remove = null) {
  list.replaceChildren(...pictures.map((one, place) => thumb(one, place, remove)));
  list.hidden = !pictures.length;
}

function thumb(one, place, remove) {
  const node = find("picture-template").content.firstElementChild.cloneNode(true);
  const name = word("picture_name", { n: place + 1, name: one.name, width: one.width, height: one.height });
  const [look, away] = [node.querySelector(".look"), node.querySelector(".remove")];
  if (one.url) {
    Object.assign(node.querySelector("img"), { src: one.url, alt: name });
    look.addEventListener("click", () => enlarge(one, name));
    look.title = word("look", { name: one.name });
  } else {
    look.disabled = true;
    look.replaceChildren("?");
    look.title = word("picture_lost");
    look.setAttribute("aria-label", `${name}. ${word("picture_lost")}`);
  }
  if (!remove) away.remove();
  away.title = word("remove", { name: one.name });
  away.setAttribute("aria-label", away.title);
  away.addEventListener("click", () => remove(one));
  return node;
}

function enlarge(one, name) {
  const box = find("large");
  Object.assign(box.querySelector("img"), { src: one.url, alt: name });
  box.querySelector("p").textContent = name;
  box.showModal();
}

/** A turn's node, with its buttons bound: calls.edit, retry, vote(type), copy. */
export function made(one, calls) {
  const node = find("turn-template").content.firstElementChild.cloneNode(true);
  const press = (selector, call) => node.querySelector(selector).addEventListener("click", call);
  press(".edit", calls.edit);
  press(".amend", calls.edit);
  press(".again", calls.retry);
  press(".retry", calls.retry);
  press(".copy", calls.copy);
  for (const button of node.querySelectorAll("[data-vote]")) {
    button.addEventListener("click", () => calls.vote(button.dataset.vote));
  }
  fill(node);
  drawQuestion(node, one);
  return node;
}

function drawQuestion(node, one) {
  thumbs(node.querySelector(".pictures"), one.pictures);
  node.querySelector(".asked .words").textContent = one.text;
}

/** The answer as far as it is there; `last`: of the conversation, which alone can be asked again or changed. */
export function draw(node, one, { last, votes, busy, voting }) {
  const hidden = (selector, when) => { node.querySelector(selector).hidden = when; };
  const ended = one.state !== "asking";
  node.classList.toggle("unasked", ended && !one.answer);
  node.setAttribute("aria-busy", String(!ended));
  node.querySelector(".said > .words").replaceChildren(rendered(one.answer));
  hidden(".said > .words", !one.answer);
  hidden(".waiting", ended || Boolean(one.answer));
  hidden(".foot", !ended || (one.state === "failed" && !one.answer));
  hidden(".copy", !one.answer);
  hidden(".again", !last || busy || one.state === "failed");
  hidden(".edit", !last || busy || !ended);
  hidden(".fault .tools", !last || busy);
  hidden(".votes", !votes || !one.answer || !ended);
  for (const button of node.querySelectorAll("[data-vote]")) {
    button.disabled = Boolean(one.vote) || voting;
    button.setAttribute("aria-pressed", String(button.dataset.vote === one.vote));
  }
  node.querySelector(".count").textContent = counts(one, last);
  drawFault(node.querySelector(".fault"), one.fault);
}

function counts(one, last) {
  const told = [];
  const stats = one.stats || {};
  if (stats.tokens !== undefined) told.push(word(stats.tokens === 1 ? "tokens_one" : "tokens", { n: number(stats.tokens) }));
  if (stats.seconds !== undefined) told.push(word("seconds", { n: number(stats.seconds, stats.seconds < 10 ? 2 : 1) }));
  if (stats.first !== undefined) told.push(word("first_after", { n: number(stats.first, 2) }));
  if (stats.prompt !== undefined) told.push(word("prompt_tokens", { n: number(stats.prompt) }));
  if (one.state === "stopped") told.push(word("stopped"));
  if (one.reason === "length") told.push(word("cut_at_length"));
  if (one.vote) told.push(word("voted"));
  if (!last && !one.answer) told.push(word("unasked"));
  return [one.model, ...told].filter(Boolean).join(" · ");
}

/** What went wrong, as the server or the browser told it. */
export function faultWords({ kind, status, message, param, code, retryAfter, partial }) {
  const what = kind === "refused" ? (status >= 500 ? "fault_server" : "fault_refused") : `fault_${kind}`;
  const help = [];
  if (status === 401) help.push(word("help_key"));
  if (retryAfter) help.push(word("help_busy", { n: number(retryAfter, 1) }));
  if (partial) help.push(word("help_cut"));
  if (kind === "away") help.push(word("help_away"));
  const where = [param && word("at_param", { param }), code && word("at_code", { code })];
  return { what: word(what, { status }), why: message || word("no_words"), where: where.filter(Boolean).join(" · "), help: help.join(" ") };
}

function drawFault(node, fault) {
  node.hidden = !fault;
  if (!fault) return;
  for (const [name, text] of Object.entries(faultWords(fault))) {
    const part = node.querySelector(`.${name}`);
    if (part.textContent !== text) part.textContent = text;
    part.hidden = !text;
  }
}
