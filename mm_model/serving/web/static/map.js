// Two layers in their place on one canvas, with a line between them that swipes.

const MARGIN_PX = 24;
const MOST_PX = 64; // of the screen, that a pixel of the grid is zoomed to
const LEAST = 1 / 8; // of the size at which all of the grid is seen

/**
 * A grid as the endpoint tells it: `transform` a,b,c,d,e,f gives x = a*col + b*row + c and
 * y = d*col + e*row + f; `corners_lonlat` (or null) where its corners lie.
 */
export class MapView {
  /** @param {(at: {grid: object, row: number, col: number} | null) => void} onpoint */
  constructor(canvas, swipe, onpoint) {
    Object.assign(this, { canvas, swipe, onpoint, grid: null, left: null, right: null });
    [this.x, this.y, this.scale] = [0, 0, 1]; // the middle, and screen pixels a unit along x
    this.scales = [1, 1]; // the least and the most
    this.pointers = new Map();
    new ResizeObserver(() => this.draw()).observe(canvas);
    swipe.addEventListener("input", () => this.draw());
    this.#listen();
  }

  /** Show layers, each {grid, picture}; the view stays where it is unless the grid is another. */
  show(left, right) {
    const grid = (left ?? right)?.grid ?? null;
    const moved = JSON.stringify(grid) !== JSON.stringify(this.grid);
    Object.assign(this, { left, right, grid });
    if (moved && grid) this.fit();
    else this.draw();
  }

  /** All of the grid, in the middle. */
  fit() {
    if (!this.grid) return;
    const { width, height } = this.grid;
    const ground = groundOf(this.grid);
    this.tall = ground.tall;
    this.metres = ground.metres;
    const corners = [[0, 0], [height, 0], [0, width], [height, width]].map(([r, c]) => xy(this.grid, r, c));
    const xs = corners.map((p) => p[0]), ys = corners.map((p) => p[1]);
    const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    [this.x, this.y] = [(left + right) / 2, (low + high) / 2];
    this.scale = Math.min(
      (this.canvas.clientWidth - 2 * MARGIN_PX) / (right - left),
      (this.canvas.clientHeight - 2 * MARGIN_PX) / (high - low) / this.tall,
    );
    const [a, , , d] = transformOf(this.grid);
    this.scales = [LEAST * this.scale, Math.max(this.scale, MOST_PX / Math.hypot(a, d))];
    this.draw();
  }

  /** Zoom about a point of the canvas, its middle by default, as far as there is something to see. */
  zoom(factor, px = this.canvas.clientWidth / 2, py = this.canvas.clientHeight / 2) {
    const [x, y] = this.#world(px, py);
    const [least, most] = this.scales;
    this.scale = Math.min(most, Math.max(least, this.scale * factor));
    this.x = x - (px - this.canvas.clientWidth / 2) / this.scale;
    this.y = y + (py - this.canvas.clientHeight / 2) / this.scale / this.tall;
    this.draw();
  }

  pan(dx, dy) {
    this.x -= dx / this.scale;
    this.y += dy / this.scale / this.tall;
    this.draw();
  }

  draw() {
    const { canvas, grid } = this;
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    if (!grid || !width) return;
    const context = canvas.getContext("2d");
    const split = 22 + (this.swipe.value / 1000) * (width - 44); // where the thumb's middle is
    for (const [layer, from, to] of [[this.left, 0, split], [this.right, split, width]]) {
      if (layer?.grid.crs !== grid.crs) continue;
      context.save();
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.beginPath();
      context.rect(from, 0, to - from, height);
      context.clip();
      this.#place(context, layer, ratio);
      context.restore();
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.#frame(context, width, height);
    context.fillStyle = "#fff";
    context.fillRect(split - 1, 0, 2, height);
    if (document.activeElement === canvas) this.#cross(context, width / 2, height / 2);
  }

  #place(context, { grid, picture }, ratio) {
    const [a, b, c, d, e, f] = transformOf(grid);
    const { scale, tall } = this;
    const px = ratio * scale, py = -ratio * scale * tall;
    const left = (ratio * this.canvas.clientWidth) / 2 - this.x * px;
    const top = (ratio * this.canvas.clientHeight) / 2 - this.y * py;
    context.setTransform(a * px, d * py, b * px, e * py, c * px + left, f * py + top);
    context.fillStyle = "#5c666b"; // where nothing is known
    context.fillRect(0, 0, grid.width, grid.height);
    context.imageSmoothingEnabled = Math.hypot(a, d) * scale < 1;
    context.drawImage(picture, 0, 0);
  }

  /** Lines of the reference system, their numbers, and a scale. */
  #frame(context, width, height) {
    const [left, top] = this.#world(0, 0), [right, low] = this.#world(width, height);
    context.font = "11px system-ui, sans-serif";
    context.strokeStyle = "#ffffff38";
    context.lineWidth = 1;
    const step = niceStep(110 / this.scale), down = niceStep(110 / this.scale / this.tall);
    const label = (text, x, y) => {
      context.fillStyle = "#20282cc0";
      context.fillRect(x - 3, y - 11, context.measureText(text).width + 6, 14);
      context.fillStyle = "#fff";
      context.fillText(text, x, y);
    };
    const line = (x1, y1, x2, y2) => {
      context.beginPath();
      context.moveTo(x1, y1);
      context.lineTo(x2, y2);
      context.stroke();
    };
    for (const x of multiples(step, left, right)) {
      const px = Math.round(width / 2 + (x - this.x) * this.scale) + 0.5;
      line(px, 0, px, height);
      label(tick(x, step), px + 4, height - 6);
    }
    for (const y of multiples(down, low, top)) {
      const py = Math.round(height / 2 - (y - this.y) * this.scale * this.tall) + 0.5;
      line(0, py, width, py);
      if (py > 90 && py < height - 40) label(tick(this.grid.crs ? y : -y, down), 6, py - 3);
    }
    const long = niceStep(70 * (this.metres ?? 1) / this.scale);
    const bar = (long * this.scale) / (this.metres ?? 1), at = width - 66 - bar;
    context.fillStyle = "#20282cc0";
    context.fillRect(at - 6, height - 52, bar + 12, 26);
    context.fillStyle = "#fff";
    context.fillRect(at, height - 34, bar, 3);
    const unit = this.metres ? (long >= 1000 ? `${long / 1000} km` : `${tick(long, long)} m`) : `${tick(long, long)} px`;
    context.fillText(unit, at, height - 39);
  }

  #cross(context, x, y) {
    for (const [color, width] of [["#000a", 4], ["#fff", 2]]) {
      context.strokeStyle = color;
      context.lineWidth = width;
      context.beginPath();
      context.moveTo(x - 9, y);
      context.lineTo(x + 9, y);
      context.moveTo(x, y - 9);
      context.lineTo(x, y + 9);
      context.stroke();
    }
  }

  #world(px, py) {
    return [
      this.x + (px - this.canvas.clientWidth / 2) / this.scale,
      this.y - (py - this.canvas.clientHeight / 2) / this.scale / this.tall,
    ];
  }

  /** Tell which pixel of the grid lies at a point of the canvas, its middle by default. */
  point(px = this.canvas.clientWidth / 2, py = this.canvas.clientHeight / 2) {
    if (!this.grid) return;
    const [a, b, c, d, e, f] = transformOf(this.grid);
    const [x, y] = this.#world(px, py), det = a * e - b * d;
    const col = Math.floor((e * (x - c) - b * (y - f)) / det);
    const row = Math.floor((a * (y - f) - d * (x - c)) / det);
    const inside = row >= 0 && col >= 0 && row < this.grid.height && col < this.grid.width;
    this.onpoint(inside ? { grid: this.grid, row, col } : null);
  }

  #listen() {
    const { canvas, pointers } = this;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
      this.point(event.offsetX, event.offsetY);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.grid) return;
      const before = pointers.get(event.pointerId), now = [event.offsetX, event.offsetY];
      if (before) {
        const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
        pointers.set(event.pointerId, now);
        if (!others.length) this.pan(now[0] - before[0], now[1] - before[1]);
        else {
          const [other] = others, apart = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]);
          this.zoom(apart(now) / Math.max(1, apart(before)), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
        }
      }
      this.point(...now);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, (event) => pointers.delete(event.pointerId));
    }
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (this.grid) this.zoom(1.0015 ** -event.deltaY, event.offsetX, event.offsetY);
    }, { passive: false });
    const steps = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
    canvas.addEventListener("keydown", (event) => {
      if (!this.grid || event.ctrlKey || event.metaKey || event.altKey) return;
      if (steps[event.key]) this.pan(...steps[event.key]);
      else if (event.key === "+" || event.key === "=") this.zoom(1.5);
      else if (event.key === "-") this.zoom(1 / 1.5);
      else if (event.key === "0") this.fit();
      else return;
      event.preventDefault();
      this.point();
    });
    canvas.addEventListener("focus", () => { this.draw(); if (canvas.matches(":focus-visible")) this.point(); });
    canvas.addEventListener("blur", () => this.draw());
  }
}

/** Longitude and latitude of the middle of a pixel, between the corners; null if it lies nowhere. */
export function lonlatOf({ corners_lonlat: corners, width, height }, row, col) {
  if (!corners) return null;
  const u = (col + 0.5) / width, v = (row + 0.5) / height;
  return [0, 1].map((k) =>
    (1 - v) * ((1 - u) * corners[0][k] + u * corners[1][k]) + v * ((1 - u) * corners[3][k] + u * corners[2][k]));
}

export function lonlatInWords([lon, lat], digits = 4) {
  return `${Math.abs(lat).toFixed(digits)}° ${lat < 0 ? "S" : "N"}, ${Math.abs(lon).toFixed(digits)}° ${lon < 0 ? "W" : "E"}`;
}

/** Rows go down on the screen, also where a grid lies nowhere and counts them as y. */
function transformOf({ crs, transform }) {
  return crs ? transform : [1, 0, 0, 0, -1, 0];
}

function xy(grid, row, col) {
  const [a, b, c, d, e, f] = transformOf(grid);
  return [a * col + b * row + c, d * col + e * row + f];
}

/** Metres on the ground a unit of x, and how much taller than wide a unit is (degrees are). */
function groundOf(grid) {
  const { corners_lonlat: corners, width, height } = grid;
  if (!corners) return { metres: null, tall: 1 };
  const [a, b, , d, e] = transformOf(grid);
  const east = metresBetween(corners[0], corners[1]) / (width * Math.hypot(a, d));
  const south = metresBetween(corners[0], corners[3]) / (height * Math.hypot(b, e));
  const straight = Math.abs(a) > Math.abs(d) ? south / east : east / south;
  return { metres: Math.abs(a) > Math.abs(d) ? east : south, tall: Math.abs(straight - 1) < 0.02 ? 1 : straight };
}

function metresBetween([lon1, lat1], [lon2, lat2]) {
  const rad = Math.PI / 180;
  const a = Math.sin(((lat2 - lat1) * rad) / 2) ** 2
    + Math.cos(lat1 * rad) * Math.cos(lat2 * rad) * Math.sin(((lon2 - lon1) * rad) / 2) ** 2;
  return 2 * 6371008.8 * Math.asin(Math.sqrt(a));
}

/** The least of 1, 2 and 5 times a power of ten that is not below a length. */
function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((k) => k * power >= least);
}

/** Multiples of a step from `low` to `high`; counted, as a step too small for a double adds nothing. */
function multiples(step, low, high) {
  const first = Math.ceil(low / step), count = Math.floor(high / step) - first + 1;
  return Array.from({ length: Math.max(0, count) }, (_, k) => (first + k) * step);
}

function tick(value, step) {
  return value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9))).replace(/^-(?=0(\.0*)?$)/, "").replace("-", "−");
}
