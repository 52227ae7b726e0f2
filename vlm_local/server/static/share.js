// The page of `share`: one episode with its pictures in one file.

import { openPlayer } from "./player.js";

const { name, steps, frames } = JSON.parse(document.getElementById("episode").textContent);
openPlayer({ name, steps, frameUrl: (index) => frames[index] ?? null });
