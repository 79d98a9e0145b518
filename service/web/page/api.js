/** What the page asks the service. Every refusal becomes a `Refusal`, in the service's own words. */

import { askForKey, readKey } from "./key.js";
import { readNpy } from "./npy.js";

/** @typedef {{name: string, version: string, labels?: number, task?: string, resting?: boolean}} Model */
/** @typedef {{label: string, index: number, probability: number, selected?: boolean}} Prediction */
/** @typedef {{height: number, width: number, values: number[][]}} Heatmap 0 … 1, over the whole photo as it is seen */
/**
 * @typedef {object} Saw the exact input
 * @property {number} width
 * @property {number} height
 * @property {string} png base64
 * @property {[number, number, number, number]} box left, top, right, bottom: what it covers of the photo, in its pixels
 * @property {{step: string, text: string}[]} steps
 */
/**
 * @typedef {object} Layer see `GET …/layers` in the API
 * @property {string} tensor
 * @property {string} name
 * @property {string} kind
 * @property {string[]} sources
 * @property {number[]} shape (channels, height, width), or (n,), or what has no picture
 * @property {string | null} block
 * @property {[number, number] | null} kernel
 * @property {[number, number] | null} stride
 * @property {[number, number, number, number] | null} padding top, left, bottom, right
 * @property {[number, number] | null} dilation
 * @property {number} groups
 * @property {number} parameters
 * @property {Record<string, number>} constants
 * @property {Record<string, number | string>} attributes
 * @property {number} left_out tokens that are no place, such as the class token
 * @property {boolean} direct false: its sources are cut or rearranged before it reads them
 * @property {string[]} weights
 * @property {string | null} input the vector that a linear layer multiplies with its weights
 * @property {"CHW" | "HWC" | null} order in which a flattening writes its source into one row; null if unknown
 * @property {{rows: [number, number, number], columns: [number, number, number]} | null} field
 */
/**
 * @typedef {object} Description
 * @property {string} task
 * @property {string[]} labels
 * @property {{height: number, width: number}} input
 * @property {number} temperature
 * @property {number} parameters
 * @property {boolean} cam
 * @property {string | null} reason
 * @property {Layer[]} layers
 */
/** @typedef {import("./upload.js").Upload} Upload a photo that is sent once and asked about many times */
/** @typedef {{body: Blob | Upload, prepared: boolean}} Picture an image, and whether it is the exact input already */

/** The service's own address, by this file's: it has the prefix that a proxy may have put in front of ours. */
const ROOT = import.meta.url.replace(/page\/(v-\w+\/)?api\.js$/, "");

/** Statuses that say something of the photo itself. */
const OF_THE_PHOTO = [400, 413, 415, 422];

/** A request that had no answer. Its message is meant for people. */
export class Refusal extends Error {
  /**
   * @param {string} message
   * @param {string} code the service's own, or "unreachable"
   * @param {boolean} lasting whether asking again cannot help
   */
  constructor(message, code, lasting = false) {
    super(message);
    this.code = code;
    this.lasting = lasting;
  }
}

/** Every model that is served, those that rest last. @returns {Promise<(Model & {default: boolean})[]>} */
export async function models() {
  const { models: loaded, resting } = await read(`${ROOT}v1/models`);
  return [...loaded, ...resting.map((model) => ({ ...model, resting: true, default: false }))];
}

/** What a model says about itself. */
export async function contract(model) {
  return read(`${path(model)}/contract`);
}

/** The network's layers. @returns {Promise<Description>} */
export async function layers(model) {
  return read(`${path(model)}/layers`);
}

/**
 * Let the service keep a photo for questions. @param {File} photo
 * @param {(share: number) => void} progress called with how much of it has been sent @param {AbortSignal} signal
 * @returns {Promise<string>} its URL for `Upload`
 */
export async function keep(photo, progress, signal) {
  return (await read(`${ROOT}v1/images`, { photo, signal, progress })).url;
}

/** Let the service fetch a photo, and keep it for questions. @param {string} address @param {AbortSignal} signal @returns {Promise<string>} its URL for `Upload` */
export async function fetched(address, signal) {
  return (await read(`${ROOT}v1/images`, { json: { url: address }, signal })).url;
}

/**
 * The labels of one photo, and how many milliseconds all of it took.
 * @param {Model} model @param {Upload} photo @param {number} top how many labels @param {AbortSignal} [signal]
 */
export async function classify(model, photo, top, signal) {
  if (photo.file?.size === 0 && (await isReadable(photo.file))) throw new Refusal("the file is empty", "bad_image", true);
  const started = performance.now();
  const reply = await read(`${path(model)}/classify?top_k=${top}&timing=true`, { photo, signal });
  return { ...reply, total: performance.now() - started };
}

/**
 * What the model looked at: one object after another as it is found out; the last one has all.
 * @param {Model} model @param {Upload} photo @param {string | null} label null for the most probable
 * @param {AbortSignal} [signal] @param {number} [top] how many labels of the answer
 */
export async function* explain(model, photo, label, signal, top = 5) {
  const query = new URLSearchParams({ progress: "true", top_k: String(top), ...(label === null ? {} : { label }) });
  const reply = await ask(`${path(model)}/explain?${query}`, { photo, signal });
  for await (const line of lines(reply)) {
    const told = JSON.parse(line);
    if (told.error) throw new Refusal(told.error.message, told.error.code);
    yield told.result ?? told;
  }
}

/**
 * Values of a tensor for one picture: `count` maps from the `first` on, 0 for all.
 * @param {Model} model @param {string} tensor @param {number} first @param {number} count
 * @param {Picture} picture @param {AbortSignal} [signal]
 * @returns {Promise<import("./npy.js").NumberArray & {channels: number, lowest: number, highest: number}>}
 */
export async function maps(model, tensor, first, count, picture, signal) {
  return mapsBy(model, { tensor, first: String(first), count: String(count) }, picture, signal);
}

/**
 * As `maps`, by the options of the call: single maps by their `indices`, or the `strength` of each.
 * @param {Model} model @param {Record<string, string>} options
 * @param {Picture} picture @param {AbortSignal} [signal]
 */
export async function mapsBy(model, options, picture, signal) {
  const query = new URLSearchParams(options);
  if (picture.prepared) query.set("prepared", "true");
  const reply = await ask(`${path(model)}/maps?${query}`, { photo: picture.body, signal });
  const header = (name) => Number(reply.headers.get(name));
  return {
    ...readNpy(await heard(reply.arrayBuffer())),
    channels: header("X-Channels"),
    lowest: header("X-Lowest"),
    highest: header("X-Highest"),
  };
}

/**
 * Learned numbers of a layer: `part` as in `Layer.weights`, for `count` outputs from the `first` on.
 * @returns {Promise<import("./npy.js").NumberArray>}
 */
export async function weights(model, tensor, part, first = 0, count = 1) {
  const query = new URLSearchParams({ tensor, part, first: String(first), count: String(count) });
  const reply = await ask(`${path(model)}/weights?${query}`);
  return readNpy(await heard(reply.arrayBuffer()));
}

/** One of the page's own photos. @param {string} url */
export async function sample(url) {
  const content = await heard((await ask(url)).blob());
  return new File([content], url.slice(url.lastIndexOf("/") + 1), { type: content.type });
}

function path({ name, version }) {
  return `${ROOT}v1/models/${encodeURIComponent(name)}/versions/${encodeURIComponent(version)}`;
}

/** As JSON. */
async function read(url, options) {
  return heard((await ask(url, options)).json());
}

/**
 * Ask about nothing, about a picture, or about an uploaded photo: by its URL, or where the service does not keep it, by
 * the photo itself.
 * @returns {Promise<Response>} with status 200, or it throws a `Refusal` (or `AbortError`, where it was called off)
 */
async function ask(url, options = {}) {
  const { photo: upload, signal } = options;
  if (!upload?.url) return send(url, options); // a file or a picture
  // The first time it may be too old, or in another worker of the service.
  for (let attempt = 0; attempt < 2; attempt += 1) {
    const kept = await upload.url();
    signal?.throwIfAborted();
    if (!kept) break;
    try {
      return await send(url, { json: { images: [{ url: kept }] }, signal });
    } catch (error) {
      if (error.code !== "upload_not_found") throw error;
      await upload.forget(kept);
    }
  }
  return send(url, { photo: upload.file, signal });
}

async function send(url, { photo, json, signal, progress }) {
  const body = json ? JSON.stringify(json) : photo;
  const type = json ? "application/json" : "application/octet-stream";
  for (;;) {
    const key = readKey();
    const headers = { ...(body && { "Content-Type": type }), ...(key && { Authorization: `Bearer ${key}` }) };
    const sent = { ...(body && { method: "POST", body }), headers, signal };
    const reply = await heard(progress ? transfer(url, sent, progress) : fetch(url, sent), photo);
    if (reply.ok) return reply;
    const error = await refusal(reply);
    // Another request may have a new key since this one was sent.
    if (reply.status !== 401 || (readKey() === key && !(await askForKey(error.message)))) throw error;
  }
}

/** As `fetch`, which does not tell how much of a body has been sent. @returns {Promise<Response>} */
function transfer(url, { method, body, headers, signal }, progress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, url);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = ({ loaded, total }) => progress(loaded / total);
    request.onload = () => resolve(new Response(request.responseText, { status: request.status }));
    request.onerror = () => reject(new TypeError("the network failed"));
    request.onabort = () => reject(new DOMException("it was called off", "AbortError"));
    signal.addEventListener("abort", () => request.abort());
    request.send(body);
  });
}

/** What a promise of the network gives; or its failure, in words. @param {Blob} [photo] that was sent */
async function heard(promise, photo) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (photo && !(await isReadable(photo)))
      throw new Refusal("the browser cannot read it; is it a folder, or gone?", "unreadable", true);
    throw new Refusal("the service does not answer; is it still running?", "unreachable");
  }
}

function isReadable(photo) {
  return photo
    .slice(0, 1)
    .arrayBuffer()
    .then(Boolean, () => false);
}

async function refusal(reply) {
  try {
    const { error } = await reply.json();
    return new Refusal(error.message, error.code, OF_THE_PHOTO.includes(reply.status));
  } catch {
    return new Refusal(`the service answered with status ${reply.status}`, "unreadable");
  }
}

async function* lines(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await heard(reader.read());
    const parts = (rest + (value ?? "")).split("\n");
    rest = parts.pop();
    yield* parts.filter(Boolean);
    if (done) break;
  }
  if (rest) yield rest;
}
