// A conversation: its turns, what of them is asked, what of them a vote tells, and how it outlives a reload.
import { dataUrl, digestOf, fromDataUrl } from "./pictures.js";

const KEPT = "vistune.talk";

/** A turn. `state`: "asking", "done", "stopped", "failed"; `stats` and `fault` as they were. */
export function turn(text, pictures) {
  return { text, pictures, answer: "", state: "asking", stats: null, fault: null, vote: "", model: "", parameters: null };
}

/** Turns that count: those with an answer, or the one that is asked now. */
export const counted = (turns) => turns.filter((one) => one.answer || one.state === "asking");

export const shown = (turns) => counted(turns).flatMap((one) => one.pictures.filter((picture) => picture.blob));

/** Messages as OpenAI's clients send them; pictures stand before the words of their turn. */
export async function messages(turns, system) {
  const found = system.trim() ? [{ role: "system", content: system }] : [];
  for (const one of counted(turns)) {
    const parts = await Promise.all(one.pictures.filter((picture) => picture.blob).map(part));
    found.push({ role: "user", content: parts.length ? [...parts, { type: "text", text: one.text }] : one.text });
    if (one.answer && one.state !== "asking") found.push({ role: "assistant", content: one.answer });
  }
  return found;
}

async function part(one) {
  return { type: "image_url", image_url: { url: await dataUrl(one) } };
}

/** What a vote on a turn tells: texts and digests, no picture. */
export async function vote(type, turns, one) {
  const { system, ...parameters } = one.parameters;
  const told = system.trim() ? [{ role: "system", text: system }] : [];
  for (const each of counted(turns.slice(0, turns.indexOf(one) + 1))) {
    const pictures = await Promise.all(each.pictures.filter((picture) => picture.blob).map(digestOf));
    told.push({ role: "user", text: each.text, pictures });
    if (each !== one) told.push({ role: "assistant", text: each.answer });
  }
  return { type, model: one.model, messages: told, parameters, answer: one.answer };
}

/** Keep everything for a reload of this tab: true; or the texts alone, where pictures do not fit: false. */
export async function keep(turns, draft) {
  const whole = await flat(turns, draft, async (one) => ({ ...named(one), data: one.blob ? await dataUrl(one) : "" }));
  if (stored(whole)) return true;
  stored(await flat(turns, draft, async (one) => ({ ...named(one), data: "" })));
  return false;
}

const named = ({ name, width, height }) => ({ name, width, height });

async function flat(turns, draft, how) {
  const whole = async (one) => ({ ...one, pictures: await Promise.all(one.pictures.map(how)) });
  return JSON.stringify({ turns: await Promise.all(turns.map(whole)), draft: await whole(draft) });
}

function stored(text) {
  try {
    sessionStorage.setItem(KEPT, text);
    return true;
  } catch (error) {
    console.info("not kept:", error.name);
    return false;
  }
}

/** What was kept: {turns, draft}. A picture that was not has no blob; an answer that was coming has stopped. */
export async function kept() {
  let found = null;
  try {
    found = JSON.parse(sessionStorage.getItem(KEPT) || "null");
  } catch (error) {
    console.info("nothing kept:", error.name);
  }
  if (!found) return { turns: [], draft: { text: "", pictures: [] } };
  const again = async (one) => ({
    ...one,
    state: one.state === "asking" ? "stopped" : one.state,
    pictures: await Promise.all(one.pictures.map((each) => (each.data ? fromDataUrl(each) : each))),
  });
  return { turns: await Promise.all(found.turns.map(again)), draft: await again(found.draft) };
}
