// The page of `view`: recorded episodes and detector logs, without a model.

import { leaveAnswers, showAnswers } from "./answers.js";
import { leaveEpisode, showEpisode, showList } from "./episodes.js";

function route() {
  const [part, run, id] = location.hash.slice(1).split("/");
  const name = part === "detector" ? part : "episodes";
  for (const main of ["episodes", "detector"]) document.getElementById(main).hidden = main !== name;
  for (const link of document.querySelectorAll("nav a")) link.toggleAttribute("aria-current", link.hash === `#${name}`);
  leaveEpisode();
  leaveAnswers();
  if (name === "detector") showAnswers();
  else id ? showEpisode(run, decodeURIComponent(id)) : showList();
}

addEventListener("hashchange", route);
route();
