// The page of `view`: recorded episodes and detector logs, without a model.

import { showPart } from "./parts.js";

const route = () => showPart("episodes", "detector");

addEventListener("hashchange", route);
route();
