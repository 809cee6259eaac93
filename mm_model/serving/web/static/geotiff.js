// Reads what the endpoint writes: zips without compression, and GeoTIFFs with deflate. Files of
// people never come here: the endpoint reads them, checks them, and answers with its own.

/** The files of a zip: name → bytes. */
export function readZip(bytes) {
  const view = viewOf(bytes);
  let end = bytes.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("The answer is no whole zip.");
  const files = new Map();
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    if (view.getUint16(at + 10, true) !== 0) throw new Error("The zip is compressed.");
    const [size, nameSize, extraSize, commentSize] = [
      view.getUint32(at + 24, true), view.getUint16(at + 28, true),
      view.getUint16(at + 30, true), view.getUint16(at + 32, true),
    ];
    const name = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + nameSize));
    const local = view.getUint32(at + 42, true);
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    files.set(name, bytes.subarray(start, start + size));
    at += 46 + nameSize + extraSize + commentSize;
  }
  return files;
}

const SIZES = { 1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 12: 8 };
const TAG = {
  width: 256, height: 257, bits: 258, compression: 259, stripOffsets: 273, samples: 277,
  rowsPerStrip: 278, stripBytes: 279, planar: 284, predictor: 317, tileWidth: 322, tileHeight: 323,
  tileOffsets: 324, tileBytes: 325,
};

/**
 * The pixels of a GeoTIFF.
 *
 * @returns {Promise<{width: number, height: number, bands: (Float32Array | Uint8Array)[]}>}
 *   row by row; NaN, or class 0, where nothing is known.
 */
export async function readGeotiff(bytes) {
  const view = viewOf(bytes);
  if (view.getUint32(0, true) !== 0x002a4949) throw new Error("The answer is no little-endian TIFF.");
  const tags = readTags(view);
  const one = (name, otherwise) => tags.get(TAG[name])?.[0] ?? otherwise;
  const width = one("width"), height = one("height"), count = one("samples", 1);
  const bits = one("bits"), planar = one("planar", 1) === 2, predictor = one("predictor", 1);
  const tiled = tags.has(TAG.tileOffsets);
  const across = tiled ? one("tileWidth") : width;
  const down = tiled ? one("tileHeight") : Math.min(one("rowsPerStrip", height), height);
  const offsets = tags.get(tiled ? TAG.tileOffsets : TAG.stripOffsets);
  const sizes = tags.get(tiled ? TAG.tileBytes : TAG.stripBytes);
  const compression = one("compression", 1);
  if ((bits !== 8 && bits !== 32) || ![1, 8, 32946].includes(compression)) {
    throw new Error(`A TIFF of ${bits} bits and compression ${compression} is not read here.`);
  }
  const Kind = bits === 8 ? Uint8Array : Float32Array;
  const bands = Array.from({ length: count }, () => new Kind(width * height));
  const columns = Math.ceil(width / across), rows = Math.ceil(height / down);
  const depth = planar ? 1 : count;
  const place = async (index) => {
    const packed = bytes.subarray(offsets[index], offsets[index] + sizes[index]);
    const raw = compression === 1 ? packed.slice() : await inflate(packed);
    const found = unpredict(raw, across, depth, bits, predictor);
    const band = Math.floor(index / (columns * rows));
    const top = (Math.floor(index / columns) % rows) * down, left = (index % columns) * across;
    for (let y = 0; y < Math.min(down, height - top); y++) {
      for (let x = 0; x < Math.min(across, width - left); x++) {
        for (let k = 0; k < depth; k++) {
          bands[band + k][(top + y) * width + left + x] = found[(y * across + x) * depth + k];
        }
      }
    }
  };
  await Promise.all(offsets.map((_, index) => place(index)));
  return { width, height, bands };
}

function readTags(view) {
  const tags = new Map();
  let at = view.getUint32(4, true);
  for (let left = view.getUint16(at, true), entry = at + 2; left > 0; left--, entry += 12) {
    const type = view.getUint16(entry + 2, true), count = view.getUint32(entry + 4, true);
    const size = SIZES[type] ?? 1;
    at = size * count > 4 ? view.getUint32(entry + 8, true) : entry + 8;
    if (type !== 3 && type !== 4) continue; // only whole numbers are wanted here
    const values = Array.from({ length: count }, (_, k) =>
      type === 3 ? view.getUint16(at + 2 * k, true) : view.getUint32(at + 4 * k, true));
    tags.set(view.getUint16(entry, true), values);
  }
  return tags;
}

async function inflate(packed) {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Undo TIFF's predictor: 1 none, 2 differences of bytes, 3 of the bytes of floats, most significant first. */
function unpredict(raw, across, depth, bits, predictor) {
  if (predictor > 1) {
    const line = across * depth * (bits / 8);
    if (predictor === 2 && bits !== 8) throw new Error("Differences of floats are not read here.");
    for (let start = 0; start < raw.length; start += line) {
      for (let k = start + depth; k < start + line; k++) raw[k] += raw[k - depth];
    }
  }
  if (bits === 8) return raw;
  if (predictor !== 3) return new Float32Array(raw.buffer);
  const values = across * depth, sorted = new Uint8Array(raw.length);
  for (let start = 0; start < raw.length; start += values * 4) {
    for (let byte = 0; byte < 4; byte++) {
      for (let k = 0; k < values; k++) sorted[start + 4 * k + 3 - byte] = raw[start + byte * values + k];
    }
  }
  return new Float32Array(sorted.buffer);
}

function viewOf(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
