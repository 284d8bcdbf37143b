// What the page asks of the server, and every way in which that can fail, with the server's own words.
// Addresses are found from this file's own: right behind any prefix, with and without a slash at its end.
import { events } from "./sse.js";

const KEY = "vistune.key";
const ROOT = new URL("..", import.meta.url);
ROOT.username = ROOT.password = "";
let key = taken();

/** Why something was not done. `kind`: "refused" (an HTTP status), "away" (no answer at all), "cut" (an answer that broke
 * off), "stream" (an error told in the middle). */
export class Failure extends Error {
  constructor(kind, message, { status = 0, param = "", code = "", retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { kind, status, param, code, retryAfter });
  }
}

/** A key in the address's fragment (`#key=...`, which no server's log sees) is taken out of it and kept for this tab. */
function taken() {
  const found = new URLSearchParams(location.hash.slice(1)).get("key");
  try {
    if (found) {
      sessionStorage.setItem(KEY, found);
      history.replaceState(null, "", location.pathname + location.search);
    }
    return found || sessionStorage.getItem(KEY) || "";
  } catch (error) {
    console.info("no storage:", error.name);
    return found || "";
  }
}

export function useKey(given) {
  key = given;
  try {
    sessionStorage.setItem(KEY, given);
  } catch (error) {
    console.info("no storage:", error.name);
  }
}

async function call(path, { body, signal } = {}) {
  const headers = { Accept: "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { headers, signal, cache: "no-store", credentials: "same-origin" };
  let answer;
  try {
    answer = await fetch(new URL(path, ROOT), body ? { ...options, method: "POST", body: JSON.stringify(body) } : options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("away", error.message);
  }
  if (!answer.ok) throw await refused(answer);
  return answer;
}

/** The server's own error where it told one; else (a proxy's page) its status and the beginning of what it said. */
async function refused(answer) {
  const text = await answer.text().catch((error) => error.message);
  const more = { status: answer.status, retryAfter: Number(answer.headers.get("Retry-After")) || 0 };
  try {
    const error = JSON.parse(text).error;
    return new Failure("refused", error.message, { ...more, param: error.param || "", code: error.code || "" });
  } catch {
    const plain = /<html|<!doctype/i.test(text) ? "" : text.trim().slice(0, 400);
    return new Failure("refused", plain || answer.statusText, more);
  }
}

export const settings = async () => (await call("page/settings")).json();
export const vote = async (body) => (await call("votes", { body })).json();

/** The models in the server's order: [{id, context}], the tokens that prompt and answer may have where that is told. */
export async function models() {
  return (await (await call("v1/models")).json()).data;
}

/** Whether the server answers at all; at "ready": whether it would answer what is asked of its models. */
export async function alive(path = "health") {
  try {
    return (await fetch(new URL(path, ROOT), { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

/** The answer as it comes: {text}, {reason}, {usage}. Failure where there is no whole answer; AbortError when stopped. */
export async function* ask(body, signal) {
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await call("v1/chat/completions", { body: whole, signal });
  const type = answer.headers.get("Content-Type") || "";
  if (!type.startsWith("text/event-stream")) throw new Failure("cut", `${type || "?"}: ${answer.url}`);
  try {
    for await (const event of events(answer.body)) {
      if (event.data === "[DONE]") return;
      yield* told(JSON.parse(event.data));
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
    throw new Failure("cut", error.message);
  }
  throw new Failure("cut", "no [DONE]");
}

function* told(chunk) {
  if (chunk.error) {
    const { message, param, code } = chunk.error;
    throw new Failure("stream", message, { param: param || "", code: code || "" });
  }
  const choice = (chunk.choices || [])[0];
  if (choice?.delta?.content) yield { text: choice.delta.content };
  if (choice?.finish_reason) yield { reason: choice.finish_reason };
  if (chunk.usage) yield { usage: chunk.usage };
}
