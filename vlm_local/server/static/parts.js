// Which part of the page is shown: its address says so, with #episodes/RUN/EPISODE for one that was recorded.

import { leaveAnswers, showAnswers } from "./answers.js";
import { showEpisode, showList } from "./episodes.js";
import { by } from "./page.js";
import { closePlayer } from "./player.js";

// Shows the one of `names` that the address names, the first where it names none; returns its name.
export function showPart(...names) {
  const [part, run, id] = location.hash.slice(1).split("/");
  const name = names.includes(part) ? part : names[0];
  for (const each of names) by(each).hidden = each !== name;
  for (const link of document.querySelectorAll("nav a")) link.toggleAttribute("aria-current", link.hash === `#${name}`);
  closePlayer();
  leaveAnswers();
  if (name === "detector") showAnswers();
  if (name === "episodes") id ? showEpisode(run, decodeURIComponent(id)) : showList();
  return name;
}
