// The page: what happens when. A question is asked, an answer grows, stops, fails, is asked again, is voted on.
import * as composer from "./composer.js";
import * as models from "./models.js";
import * as parameters from "./parameters.js";
import * as server from "./server.js";
import * as talk from "./talk.js";
import * as view from "./view.js";
import { fill, turn as turnLanguage, word } from "./words.js";

const find = (id) => document.getElementById(id);
const DRAW_EVERY = 50; // milliseconds; a page in the background has no animation frames
const KEEP_EVERY = 1500;
const KNOCK_EVERY = 3000;
const GOOD_FOR = 4000;
const nodes = new WeakMap();
const voting = new Set();
let turns = [];
let editing = null;
let aside = { text: "", pictures: [] };
let running = null;
let known = null;
let away = 0;
let keeping = 0;
let fading = 0;
let waiting = 0;
let keptPictures = true;

// --- what is shown ---------------------------------------------------------------------------------------------------

/** A line above the question. `kind`: "bad", or "good", which goes again by itself. */
function notice(text, kind = "") {
  clearTimeout(fading);
  if (kind === "good") fading = setTimeout(notice, GOOD_FOR, "");
  const follow = nearEnd();
  find("notice").textContent = text;
  find("notice").hidden = !text;
  find("notice").className = `notice ${kind}`;
  if (follow) toEnd();
}

function say(text) {
  find("said").textContent = text;
}

function node(one) {
  if (!nodes.has(one)) nodes.set(one, view.made(one, callsOf(one)));
  return nodes.get(one);
}

function callsOf(one) {
  return { edit: () => edit(one), retry: () => answer(one), vote: (type) => vote(one, type), copy: () => copy(one) };
}

function drawTurn(one) {
  view.draw(node(one), one, { last: one === turns.at(-1), votes: known?.votes, busy: Boolean(running), voting: voting.has(one) });
}

function draw() {
  const wanted = turns.map(node);
  const there = [...find("turns").children];
  if (wanted.length !== there.length || wanted.some((one, place) => one !== there[place])) find("turns").replaceChildren(...wanted);
  turns.forEach(drawTurn);
  find("empty").hidden = Boolean(turns.length);
  find("send").hidden = Boolean(running);
  find("stop").hidden = !running;
  find("editing").hidden = !editing;
  find("new").disabled = !turns.length && !composer.draft.pictures.length && !composer.draft.text;
}

/** Words in another language: everything is drawn anew. */
function redraw() {
  turns.forEach((one) => nodes.delete(one));
  composer.show();
  examples();
  about();
  draw();
}

function examples() {
  const chips = ["example_1", "example_2", "example_3", "example_4"].map((name) => {
    const chip = document.createElement("button");
    Object.assign(chip, { type: "button", textContent: word(name) });
    chip.addEventListener("click", () => {
      composer.set({ text: word(name), pictures: composer.draft.pictures });
      find("text").focus();
      later();
    });
    return chip;
  });
  find("examples").replaceChildren(...chips);
}

function about() {
  if (!known) return;
  find("about").textContent = word("about", known);
  document.title = known.name;
  find("votes-note").hidden = !known.votes;
}

const nearEnd = () => find("talk").scrollHeight - find("talk").scrollTop - find("talk").clientHeight < 80;

function toEnd() {
  find("talk").scrollTop = find("talk").scrollHeight;
}

// --- asking ----------------------------------------------------------------------------------------------------------

async function submit() {
  await composer.settled();
  if (running) return;
  const { text, pictures } = composer.draft;
  if (!text.trim()) return notice(word("nothing_asked"));
  const before = editing ? turns.filter((one) => one !== editing) : turns;
  if (known && 2 * talk.counted(before).length + 2 > known.limits.messages) return notice(word("too_long", { n: known.limits.messages }));
  notice("");
  keptPictures ||= pictures.length > 0; // what was told of them is wiped away: it is told again
  const one = talk.turn(text.trim(), pictures);
  turns = [...before, one];
  composer.set(editing ? aside : { text: "", pictures: [] });
  editing = null;
  composer.focus();
  await answer(one);
}

/** Ask this turn, which is the last, for the first time or again. */
async function answer(one) {
  if (running) return;
  running = new AbortController();
  const { signal } = running;
  if (editing) stopEditing();
  Object.assign(one, { answer: "", state: "asking", stats: {}, fault: null, vote: "", reason: "", model: models.model() });
  one.parameters = parameters.parameters();
  notice("");
  say(word("waiting"));
  draw();
  toEnd();
  later();
  try {
    await listen(one, signal);
    one.state = "done";
  } catch (error) {
    failed(one, error);
  }
  running = null;
  const stay = !nearEnd();
  draw();
  if (!stay) toEnd();
  if (one.state !== "failed") say(one.state === "done" ? word("said_done", { text: one.answer }) : word("said_stopped"));
  await keep();
}

/** The answer, drawn as it grows. */
async function listen(one, signal) {
  const { system, ...drawn } = one.parameters;
  const began = performance.now();
  const seconds = () => (performance.now() - began) / 1000;
  let pending = 0;
  const show = () => {
    pending = 0;
    const follow = nearEnd();
    drawTurn(one);
    if (follow) toEnd();
  };
  try {
    const body = { model: one.model, messages: await talk.messages(turns, system), ...given(drawn) };
    for await (const piece of server.ask(body, signal)) {
      if (piece.text) {
        one.stats.first ??= seconds();
        one.answer += piece.text;
        pending ||= setTimeout(show, DRAW_EVERY);
        later(KEEP_EVERY);
      }
      if (piece.reason) one.reason = piece.reason;
      if (piece.usage) Object.assign(one.stats, { tokens: piece.usage.completion_tokens, prompt: piece.usage.prompt_tokens });
    }
  } finally {
    clearTimeout(pending);
    one.stats.seconds = seconds();
  }
}

const given = (values) => Object.fromEntries(Object.entries(values).filter(([, value]) => value !== null));

function failed(one, error) {
  if (error.name === "AbortError") {
    one.state = "stopped";
    return;
  }
  const { kind = "cut", message, status = 0, param = "", code = "", retryAfter = 0 } = error;
  Object.assign(one, { state: "failed", fault: { kind, message, status, param, code, retryAfter, partial: Boolean(one.answer) } });
  if (!(error instanceof server.Failure)) console.error(error);
  if (status === 401) find("key-form").hidden = false;
  if (kind === "away" || kind === "cut") knock(false);
}

// --- what else can be done with an answer -----------------------------------------------------------------------------

function edit(one) {
  if (!editing) aside = { ...composer.draft };
  editing = one;
  composer.set({ text: one.text, pictures: one.pictures.filter((picture) => picture.blob) });
  draw();
  find("text").focus();
}

/** What was being written before comes back. */
function stopEditing() {
  editing = null;
  composer.set(aside);
  draw();
}

async function vote(one, type) {
  voting.add(one);
  drawTurn(one);
  try {
    await server.vote(await talk.vote(type, turns, one));
    one.vote = type;
    say(word("voted"));
  } catch (error) {
    const { what, why } = view.faultWords({ kind: "vote", message: error.message });
    notice(`${what}${error.status ? ` (${error.status})` : ""}: ${why}`, "bad");
  }
  voting.delete(one);
  drawTurn(one);
  await keep();
}

async function copy(one) {
  try {
    await navigator.clipboard.writeText(one.answer);
    notice(word("copied"), "good");
  } catch (error) { // pages of plain http, not of this machine, have no clipboard: what is marked can be copied by hand
    console.info("no clipboard:", error.name);
    getSelection().selectAllChildren(node(one).querySelector(".said > .words"));
    if (document.execCommand("copy")) notice(word("copied"), "good");
  }
}

function fresh() {
  running?.abort();
  turns = [];
  editing = null;
  composer.set({ text: "", pictures: [] });
  notice("");
  draw();
  keep();
  find("text").focus();
}

// --- the server, there and away ---------------------------------------------------------------------------------------

function gone() {
  find("away").hidden = false;
  away ||= setTimeout(knock, KNOCK_EVERY);
}

async function knock() {
  away = 0;
  if (!(await server.alive())) return gone();
  known = null; // it may be another server now
  notice(word("back"), "good");
  await refresh();
}

/** The server's models as they are now, and its limits where they were not learnt yet. */
async function refresh() {
  try {
    if (!known) await learn();
    const told = await models.reload();
    allow();
    if (told) notice(told);
    find("away").hidden = true;
  } catch (error) {
    if (error.kind === "away") return gone();
    const { what, why, help } = view.faultWords(error);
    if (error.status === 401) find("key-form").hidden = false;
    if (error.retryAfter) waiting ||= setTimeout(comeAgain, 1000 * error.retryAfter); // it may be reading its models
    notice(`${what}: ${why} ${help}`, "bad");
    if (!(error instanceof server.Failure)) console.error(error);
  }
}

/** Half of a model's context is for the question: an answer that may fill it all would be refused. */
function allow() {
  parameters.allow(Math.min(known.limits.new_tokens, Math.floor(models.context() / 2)));
}

async function comeAgain() {
  waiting = 0;
  notice("");
  await refresh();
}

async function learn() {
  known = await server.settings();
  about();
  draw();
}

// --- a reload loses nothing -------------------------------------------------------------------------------------------

function later(after = 300) {
  find("new").disabled = !turns.length && !composer.draft.pictures.length && !composer.draft.text;
  keeping ||= setTimeout(keep, after);
}

async function keep() {
  clearTimeout(keeping);
  keeping = 0;
  const whole = await talk.keep(turns, composer.draft);
  if (keptPictures && !whole) notice(word("not_kept"));
  keptPictures = whole;
}

async function restore() {
  const found = await talk.kept();
  turns = found.turns;
  composer.set(found.draft);
  draw();
  toEnd();
}

// --- from here it begins ----------------------------------------------------------------------------------------------

function bindHead() {
  find("new").addEventListener("click", fresh);
  find("stop").addEventListener("click", () => { running?.abort(); find("text").focus(); });
  find("cancel-edit").addEventListener("click", () => { stopEditing(); find("text").focus(); });
  find("model").addEventListener("change", allow);
  find("language").addEventListener("click", () => { turnLanguage(); redraw(); });
  find("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("vistune.theme", theme);
  });
  find("open-settings").addEventListener("click", () => {
    const open = document.body.classList.toggle("with-settings");
    find("open-settings").setAttribute("aria-expanded", String(open));
    if (open) find("settings").focus();
  });
  find("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    server.useKey(find("key").value.trim());
    find("key").value = "";
    notice(word("key_taken"), "good");
    await refresh();
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || find("large").open || event.isComposing) return;
    if (running) running.abort();
    else if (editing) stopEditing();
    else if (document.body.classList.contains("with-settings")) find("open-settings").click();
  });
}

async function begin() {
  fill();
  bindHead();
  parameters.bind();
  examples();
  composer.bind({
    limits: async () => { if (!known) await refresh(); return known?.limits ?? OFFLINE; },
    others: () => talk.shown(editing ? turns.filter((one) => one !== editing) : turns),
    changed: later,
    notice,
    submit,
  });
  await restore();
  await refresh();
  for (const [target, name] of [[find("model"), "focus"], [find("model"), "pointerdown"], [window, "focus"]]) {
    target.addEventListener(name, refresh);
  }
  composer.focus();
  document.documentElement.dataset.ready = "yes";
}

/** While the server was never reached there are no limits to hold to: it will say. */
const OFFLINE = { pictures: Infinity, picture_bytes: Infinity, picture_pixels: Infinity, body: Infinity };

begin();
