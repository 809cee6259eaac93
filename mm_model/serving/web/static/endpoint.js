// The endpoint that served this page. A key lives in this module's memory, and nowhere else.

export const BASE = new URL(".", location.href).href;

const ASK_MS = 1000; // between two questions for how far a request is

let key = "";

export function useKey(given) {
  key = given;
}

export const hasKey = () => key !== "";

/** An answer that is no success: an RFC 9457 problem, as the endpoint words it. */
export class ProblemError extends Error {
  constructor(problem) {
    super(problem.detail);
    this.problem = problem;
  }
}

/** A GET that answers JSON. */
export async function get(path) {
  let response;
  try {
    response = await fetch(BASE + path, { headers: authorization() });
  } catch {
    throw away();
  }
  if (!response.ok) throw new ProblemError(problemOf(response.status, await response.text()));
  return response.json();
}

/**
 * POST a form.
 *
 * @param {FormData} form
 * @param {{signal?: AbortSignal, onprogress?: (phase: string, share: number | null) => void}} how
 *   phase is "sending", "computing" or "receiving"; share goes from 0 to 1, null where unknown.
 *   While it computes, the endpoint is asked for the share by the request's id.
 * @returns {Promise<{bytes: Uint8Array, header: (name: string) => string | null}>}
 */
export function post(path, form, { signal, onprogress = () => {} } = {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch tells nothing of what it has sent
    request.open("POST", BASE + path);
    request.responseType = "arraybuffer";
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    const id = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    request.setRequestHeader("X-Request-ID", id);
    let asking = 0;
    const ask = async () => {
      try {
        const { share } = await get(`v1/progress/${id}`);
        if (asking && request.readyState < XMLHttpRequest.LOADING) onprogress("computing", share || null);
      } catch { // it waits to be read, or is answered by now
      }
      if (asking) asking = setTimeout(ask, ASK_MS);
    };
    const share = (event) => (event.lengthComputable ? event.loaded / event.total : null);
    request.upload.onprogress = (event) => onprogress("sending", share(event));
    request.upload.onload = () => {
      onprogress("computing", null);
      asking = setTimeout(ask, ASK_MS);
    };
    request.onloadend = () => {
      clearTimeout(asking);
      asking = 0;
    };
    request.onprogress = (event) => onprogress("receiving", share(event));
    request.onload = () => {
      const bytes = new Uint8Array(request.response);
      if (request.status === 200) {
        resolve({ bytes, header: (name) => request.getResponseHeader(name) });
      } else {
        reject(new ProblemError(problemOf(request.status, new TextDecoder().decode(bytes))));
      }
    };
    request.onerror = () => reject(away());
    request.onabort = () => reject(new DOMException("Cancelled.", "AbortError"));
    signal?.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

function authorization() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function problemOf(status, text) {
  try {
    return JSON.parse(text);
  } catch {
    return { status, detail: `The answer has status ${status} and is no problem document.` };
  }
}

function away() {
  return new ProblemError({ status: 0, detail: `${BASE} does not answer.`, remedy: "try again once it runs" });
}
