// Where on Earth a grid lies: coastlines of Natural Earth, plate carrée.

let land;

/** Draw the world with a mark at a longitude and latitude. */
export async function drawGlobe(canvas, [lon, lat]) {
  land ??= fetch(new URL("vendor/land-110m.json", import.meta.url)).then((answer) => answer.json()).then(ringsOf);
  const rings = await land;
  const { width, height } = canvas, context = canvas.getContext("2d");
  const at = ([x, y]) => [((x + 180) / 360) * width, ((90 - y) / 180) * height];
  context.fillStyle = "#cfe0ea";
  context.fillRect(0, 0, width, height);
  context.fillStyle = "#7f8f79";
  context.beginPath();
  for (const ring of rings) {
    for (const turn of [-360, 0, 360]) { // what goes over the date line comes in on the other side
      ring.forEach(([x, y], k) => context[k ? "lineTo" : "moveTo"](...at([x + turn, y])));
      context.closePath();
    }
  }
  context.fill("evenodd");
  const [x, y] = at([lon, lat]);
  context.beginPath();
  context.arc(x, y, 9, 0, 2 * Math.PI);
  context.fillStyle = "#c81e1e";
  context.strokeStyle = "#fff";
  context.lineWidth = 4;
  context.fill();
  context.stroke();
}

/** The rings of a TopoJSON of land, in degrees. */
function ringsOf({ arcs, transform: { scale, translate }, objects }) {
  const lines = arcs.map((arc) => {
    let x = 0, y = 0;
    return arc.map(([dx, dy]) => [(x += dx) * scale[0] + translate[0], (y += dy) * scale[1] + translate[1]]);
  });
  const line = (index) => (index < 0 ? lines[~index].toReversed() : lines[index]);
  return objects.land.geometries
    .flatMap(({ type, arcs: polygons }) => (type === "Polygon" ? [polygons] : polygons))
    .flat()
    .map((ring) => unwound(ring.flatMap(line)));
}

/** A ring without jumps at the date line; one around the south pole is closed by it. */
function unwound(ring) {
  let last = ring[0][0];
  const found = ring.map(([x, y]) => [(last = x - 360 * Math.round((x - last) / 360)), y]);
  const around = Math.abs(last - ring[0][0]) > 180;
  return around ? [...found, [last, -90], [ring[0][0], -90]] : found;
}
