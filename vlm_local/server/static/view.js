// The page of `view`: recorded episodes, without a model.

import { leaveEpisode, showEpisode, showList } from "./episodes.js";

function route() {
  const [, run, id] = location.hash.slice(1).split("/");
  leaveEpisode();
  id ? showEpisode(run, decodeURIComponent(id)) : showList();
}

addEventListener("hashchange", route);
route();
