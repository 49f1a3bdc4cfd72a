import json
import math
import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmag.errors import InputError
from xmag.geometry import Polygon, inside_any, polygons_from_geojson

_SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
_HOLE = [[2, 2], [2, 8], [8, 8], [8, 2], [2, 2]]
_FAR = [[100, 100], [110, 100], [105, 110]]

_coordinates = st.integers(-20, 20)
_corners = st.lists(st.tuples(_coordinates, _coordinates), min_size=3, max_size=9, unique=True)


def _grid(low=-21, high=21, shift=0.0):
    axis = np.arange(low, high) + shift
    return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)


def _crossings(ring, point):
    """How often the ray from `point` to the right crosses the ring, by exact integer arithmetic."""
    x, y = point
    count = 0
    for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True):
        if (y0 > y) != (y1 > y):
            side = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
            count += (side > 0) == (y1 > y0) and side != 0
    return count


def _on_boundary(ring, point):
    x, y = point
    return any(
        (x1 - x0) * (y - y0) == (x - x0) * (y1 - y0)
        and min(x0, x1) <= x <= max(x0, x1)
        and min(y0, y1) <= y <= max(y0, y1)
        for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True)
    )


@given(_corners)
def test_inside_is_an_odd_number_of_crossings(corners):
    points = _grid()
    expected = [_crossings(corners, point) % 2 == 1 for point in points.astype(int).tolist()]
    boundary = [_on_boundary(corners, point) for point in points.astype(int).tolist()]

    inside = Polygon((corners,)).contains(points)
    off_boundary = ~np.array(boundary)
    np.testing.assert_array_equal(inside[off_boundary], np.array(expected)[off_boundary])


@given(st.lists(st.floats(0.1, 20), min_size=3, max_size=30), st.floats(0, 1))
def test_it_agrees_with_shapely_on_stars_with_holes(radii, turn):
    shapely = pytest.importorskip("shapely")
    angles = 2 * math.pi * (np.arange(len(radii)) + turn) / len(radii)
    star = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array(radii)[:, None]
    rings = (star, star * 0.5)
    points = _grid(shift=0.37)

    expected = shapely.contains_xy(shapely.Polygon(star, [star * 0.5]), points)
    clear = shapely.distance(shapely.Polygon(star, [star * 0.5]).boundary, shapely.points(points))
    inside = Polygon(rings).contains(points)
    np.testing.assert_array_equal(inside[clear > 1e-9], expected[clear > 1e-9])


@given(_corners, _coordinates, _coordinates)
def test_a_point_on_a_shared_edge_is_in_exactly_one_of_two_neighbours(corners, x, y):
    """A fan of triangles around any centre covers what the ring covers, modulo 2."""
    centre = (x, y)
    neighbours = zip(corners, [*corners[1:], corners[0]], strict=True)
    triangles = [Polygon(([centre, a, b],)) for a, b in neighbours if centre not in (a, b)]
    points = _grid()

    count = sum((t.contains(points).astype(int) for t in triangles), np.zeros(len(points), int))
    np.testing.assert_array_equal(count % 2 == 1, Polygon((corners,)).contains(points))


def test_a_grid_of_squares_claims_each_point_once():
    squares = [
        Polygon(([(x, y), (x + 7, y), (x + 7, y + 7), (x, y + 7)],))
        for x in range(0, 70, 7)
        for y in range(0, 70, 7)
    ]
    points = _grid(0, 70)
    assert (sum(square.contains(points).astype(int) for square in squares) == 1).all()


def test_a_hole_is_outside_whichever_way_it_runs():
    for hole in (_HOLE, _HOLE[::-1]):
        polygon = Polygon((_SQUARE, hole))
        points = np.array([[1, 1], [5, 5], [9, 5], [11, 5], [5, 1], [-1, 5]])
        assert polygon.contains(points).tolist() == [True, False, True, False, True, False]


def test_bounds_are_those_of_the_outer_ring():
    assert Polygon(([(3, -4), (9.5, 2), (1, 7)],)).bounds == (1.0, -4.0, 9.5, 7.0)


def test_any_of_several_polygons_will_do():
    polygons = polygons_from_geojson([_geometry(_SQUARE), _geometry(_FAR)])
    assert inside_any(polygons, np.array([[5, 5], [105, 105], [50, 50]])).tolist() == [1, 1, 0]
    assert inside_any([], np.zeros((3, 2))).tolist() == [0, 0, 0]
    assert inside_any(polygons, np.zeros((0, 2))).shape == (0,)


def test_many_points_in_a_polygon_of_many_corners_take_less_than_a_second():
    angles = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    circle = np.stack([50_000 + 40_000 * np.cos(angles), 40_000 + 30_000 * np.sin(angles)], axis=1)
    points = _grid(0, 400) * 250

    start = time.process_time()  # others may be using this core
    inside = Polygon((circle,)).contains(points)
    assert time.process_time() - start < 1.0
    assert inside.sum() * 250**2 == pytest.approx(np.pi * 40_000 * 30_000, rel=0.01)


def test_a_polygon_cannot_be_changed_even_after_a_pickle():
    corners = np.array(_SQUARE, dtype=float)
    polygon = Polygon((corners,))
    corners[0] = 99
    for one in (polygon, pickle.loads(pickle.dumps(polygon))):
        assert one.rings[0].tolist() == _SQUARE[:4]
        with pytest.raises(ValueError, match="read-only"):
            one.rings[0][0] = 1


def _geometry(*rings):
    return {"type": "Polygon", "coordinates": list(rings)}


def _feature(geometry):
    return {"type": "Feature", "id": "e1", "geometry": geometry, "properties": {"isLocked": False}}


_SOURCES = {
    "polygon": _geometry(_SQUARE, _HOLE),
    "multipolygon": {"type": "MultiPolygon", "coordinates": [[_SQUARE, _HOLE]]},
    "feature": _feature(_geometry(_SQUARE, _HOLE)),
    "collection": {"type": "FeatureCollection", "features": [_feature(_geometry(_SQUARE, _HOLE))]},
    "list of features": [_feature(_geometry(_SQUARE, _HOLE))],
    "geometries": {"type": "GeometryCollection", "geometries": [_geometry(_SQUARE, _HOLE)]},
    "nested": _feature({"type": "GeometryCollection", "geometries": [_geometry(_SQUARE, _HOLE)]}),
    "unclosed": _geometry(_SQUARE[:-1], _HOLE[:-1]),
    "heights": _geometry([[*xy, 7] for xy in _SQUARE], [[*xy, 7] for xy in _HOLE]),
    "unlocated": [_feature(None), _feature(_geometry(_SQUARE, _HOLE))],
}


@pytest.mark.parametrize("name", _SOURCES)
@pytest.mark.parametrize("form", ["object", "text", "file", "file by name"])
def test_every_kind_of_geojson_gives_the_same_polygon(tmp_path, name, form):
    source, path = _SOURCES[name], tmp_path / "annotations é.geojson"
    path.write_text(json.dumps(source, ensure_ascii=False), encoding="utf-8-sig")
    forms = {"object": source, "text": json.dumps(source), "file": path, "file by name": str(path)}

    (polygon,) = polygons_from_geojson(forms[form])
    assert [ring.tolist() for ring in polygon.rings] == [_SQUARE[:-1], _HOLE[:-1]]


def test_polygons_keep_their_order():
    multi = {"type": "MultiPolygon", "coordinates": [[_FAR], [_SQUARE, _HOLE]]}
    polygons = polygons_from_geojson([_geometry(_SQUARE), multi])
    assert [len(p.rings) for p in polygons] == [1, 1, 2]
    assert [p.bounds[0] for p in polygons] == [0, 100, 0]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"type": "Point", "coordinates": [1, 2]}, "the type 'Point'; expected areas"),
        (_feature({"type": "LineString", "coordinates": _SQUARE}), "the type 'LineString'"),
        ({"type": "polygon", "coordinates": [_SQUARE]}, "the type 'polygon'"),
        ({"coordinates": [_SQUARE]}, "holds a dict"),
        ({"type": ["Polygon"], "coordinates": [_SQUARE]}, "the type"),
        (None, "holds a NoneType"),
        (7, "holds a int"),
        ([_feature(_geometry(_SQUARE)), "x"], "holds a str"),
        ({"type": "FeatureCollection"}, "features of type NoneType"),
        ({"type": "MultiPolygon", "coordinates": 3}, "coordinates of type int"),
        ({"type": "MultiPolygon", "coordinates": [3]}, "coordinates of type int"),
        ({"type": "Polygon"}, "coordinates of type NoneType"),
        (_geometry(), "has no ring"),
        (_geometry([]), "shape"),
        (_geometry([[0, 0], [1, 1]]), "2 corners"),
        (_geometry([[0, 0], [1, 1], [0, 0]]), "2 corners"),
        (_geometry([[0, 0], [1, 1], [2]]), "different lengths"),
        (_geometry([[0], [1], [2]]), "shape"),
        (_geometry([["0", "0"], ["1", "1"], ["2", "0"]]), "expected numbers"),
        (_geometry([[0, 0], [1, None], [2, 0]]), "expected numbers"),
        (_geometry([[0, 0], [1, 1], [math.nan, 0]]), "NaN or infinite"),
        (_geometry([[0, 0], [1, 1], [math.inf, 0]]), "NaN or infinite"),
        ({"type": "FeatureCollection", "features": []}, "holds no polygon"),
        ([], "holds no polygon"),
        ('{"type": "Polygon"', "the GeoJSON text is not JSON"),
        ("missing.geojson", r"cannot read GeoJSON from 'missing\.geojson'"),
        ("a\0b", "cannot read GeoJSON"),
    ],
)
def test_what_is_no_area_is_refused_with_the_reason(source, reason):
    with pytest.raises(InputError, match=reason):
        polygons_from_geojson(source)


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "slide.geojson").write_text("P6")
    with pytest.raises(InputError, match=r"slide\.geojson is not JSON"):
        polygons_from_geojson(tmp_path / "slide.geojson")
    (tmp_path / "slide.geojson").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read GeoJSON"):
        polygons_from_geojson(tmp_path / "slide.geojson")


def test_points_of_another_shape_are_refused():
    polygon = Polygon((_SQUARE,))
    for points in (np.zeros(2), np.zeros((4, 3))):
        with pytest.raises(InputError, match=r"expected \(K, 2\)"):
            polygon.contains(points)
        with pytest.raises(InputError, match=r"expected \(K, 2\)"):
            inside_any([], points)
