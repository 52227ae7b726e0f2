// What the parts of every page share.

export const by = (id) => document.getElementById(id);

export const make = (tag, text = "", className = "") => {
  const element = document.createElement(tag);
  if (text !== "") element.textContent = text;
  if (className) element.className = className;
  return element;
};

// A line that is there while it has something to say.
export function tell(id, text) {
  by(id).textContent = text;
  by(id).hidden = !text;
}

export function post(url, body, options = {}) {
  const headers = { "Content-Type": "application/json" };
  return fetch(url, { method: "POST", headers, body: JSON.stringify(body), ...options });
}

// The JSON of an answer of the server. Throws the reason of a refusal.
export async function read(answer) {
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}
