// The page while the server reads its models: it looks whether they are there, and is then loaded anew.
import { alive } from "./server.js";
import { fill } from "./words.js";

const EVERY = 2000; // milliseconds

async function look() {
  if (await alive("ready")) return location.reload();
  document.getElementById("away").hidden = await alive();
  setTimeout(look, EVERY);
}

fill();
look();
