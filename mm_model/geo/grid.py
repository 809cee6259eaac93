"""A raster grid: coordinate reference system, affine transform and shape, as one value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mm_model.errors import GeoreferenceError

# Of a pixel: what writing a transform with few digits may move its corners.
_SAME_PIXEL = 0.01


@dataclass(frozen=True)
class Grid:
    """Where the pixels of an image lie.

    Attributes:
        crs: "EPSG:<code>" where there is one, else WKT; "" for an image that lies nowhere.
        transform: affine coefficients (a, b, c, d, e, f): x = a*col + b*row + c,
            y = d*col + e*row + f, for pixel corners, in units of the CRS.
        height, width: in pixels.
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]
    height: int
    width: int

    def __post_init__(self) -> None:
        a, b, _, d, e, _ = self.transform
        determinant = a * e - b * d
        if not all(math.isfinite(v) for v in self.transform) or determinant == 0:
            raise GeoreferenceError(
                "affine transform", got=self.transform, allowed="six finite numbers, invertible"
            )
        if self.height < 1 or self.width < 1:
            raise GeoreferenceError(
                "grid shape", got=(self.height, self.width), allowed="at least 1 x 1 pixels"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def pixel_size(self) -> tuple[float, float]:
        """Length of a pixel's side along columns and rows, in units of the CRS."""
        a, b, _, d, e, _ = self.transform
        return math.hypot(a, d), math.hypot(b, e)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Least x, least y, greatest x, greatest y of the pixel corners."""
        corners = [self.xy(row, col) for row in (0, self.height) for col in (0, self.width)]
        xs, ys = [c[0] for c in corners], [c[1] for c in corners]
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def position(self) -> tuple[int, int]:
        """Row and column of the first pixel, counted from the origin of the reference system.

        Images of one system and pixel size that overlap count every pixel alike, whatever part of
        the ground they show; for one that lies nowhere it is (0, 0).
        """
        if not self.crs:
            return 0, 0
        a, b, c, d, e, f = self.transform
        determinant = a * e - b * d
        row, col = (a * f - d * c) / determinant, (e * c - b * f) / determinant
        # In one direction even where pixels lie half a pixel off and numbers are not exact.
        return math.floor(row + 0.501), math.floor(col + 0.501)

    def xy(self, row: float, col: float) -> tuple[float, float]:
        """World coordinates of a (fractional) pixel corner."""
        a, b, c, d, e, f = self.transform
        return a * col + b * row + c, d * col + e * row + f

    def row_col(self, x: float, y: float) -> tuple[float, float]:
        """Fractional row and column of a world coordinate (inverse of `xy`)."""
        a, b, c, d, e, f = self.transform
        determinant = a * e - b * d
        dx, dy = x - c, y - f
        return (a * dy - d * dx) / determinant, (e * dx - b * dy) / determinant

    def offset_of(self, other: Grid) -> tuple[int, int] | None:
        """Row and column of another grid's first pixel, counted in pixels of this one.

        They may be negative, or beyond its sides. None if the other's pixels are not this one's:
        of another reference system, size or orientation, or a part of a pixel off.
        """
        if other.crs != self.crs:
            return None
        corners = ((0, 0), (other.height, 0), (0, other.width))
        at = [self.row_col(*other.xy(*corner)) for corner in corners]
        if not all(math.isfinite(row) and math.isfinite(col) for row, col in at):
            return None
        row, col = round(at[0][0]), round(at[0][1])
        off = (
            max(abs(r - row - down), abs(c - col - right))
            for (r, c), (down, right) in zip(at, corners, strict=True)
        )
        return (row, col) if max(off) < _SAME_PIXEL else None

    def window(self, row: int, col: int, height: int, width: int) -> Grid:
        """The grid of a window; it may reach over the edge."""
        a, b, _, d, e, _ = self.transform
        x, y = self.xy(row, col)
        return Grid(self.crs, (a, b, x, d, e, y), height, width)

    def resized(self, height: int, width: int) -> Grid:
        """The same ground with another number of pixels."""
        a, b, c, d, e, f = self.transform
        sx, sy = self.width / width, self.height / height
        return Grid(self.crs, (a * sx, b * sy, c, d * sx, e * sy, f), height, width)

    def coarser(self, factor: int) -> Grid:
        """The grid of cells of factor x factor pixels from the same corner.

        The last row and column of cells may reach over the edge.
        """
        a, b, c, d, e, f = self.transform
        transform = (a * factor, b * factor, c, d * factor, e * factor, f)
        return Grid(self.crs, transform, -(-self.height // factor), -(-self.width // factor))

    def subdivide(self, patch_px: int, stride_px: int | None = None) -> Iterator[tuple[int, int]]:
        """Upper-left (row, col) of every whole patch inside, row by row."""
        stride = stride_px or patch_px
        for row in range(0, self.height - patch_px + 1, stride):
            for col in range(0, self.width - patch_px + 1, stride):
                yield row, col
