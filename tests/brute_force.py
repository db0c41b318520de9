"""A second reading of question programs, made to disagree with the first wherever that one is wrong.

`rea2seg.scenes.programs` computes with pairs of sets over the facts of a rendering. Here a program is a predicate that is asked of one object at a time,
everything is measured anew from the masks, the depth map and the scene graph, there are no margins, and no code is shared with the executor or the verifier.
Where a choice is a matter of taste (are slivers part of the scene? is distance meant in space or in the picture?) both readings must give one answer.
"""
import math
from copy import copy
from itertools import product

import numpy as np

from rea2seg.scenes.graph import Rendered, Scene
from rea2seg.scenes.objects import extent

USES = {"drink": "mug", "light": "lamp", "table": "table", "lift": "dumbbell", "lick": "lollipop", "melt": "snowman", "toy": "doll", "read": "signboard",
        "climb": "ladder", "eat": "fork", "store": "crate", "carry": "tray"}
THIN = {"ring", "rod", "ladder", "fork", "frame", "stand"}


class World:
    def __init__(self, scene: Scene, seen: Rendered):
        self.scene, self.seen, self.alone = scene, seen, {}
        self.obj = {o.id: o for o in scene.objects}
        self.mask = {i: seen.object_ids == i for i in self.obj}
        self.px = {i: int(m.sum()) for i, m in self.mask.items()}
        ys, xs = np.indices(seen.object_ids.shape)
        self.cx = {i: xs[self.mask[i]].mean() for i in self.obj if self.px[i]}
        self.cy = {i: ys[self.mask[i]].mean() for i in self.obj if self.px[i]}
        eye, target = np.array(scene.camera.eye), np.array(scene.camera.target)
        heading = (target - eye)[:2] / np.linalg.norm((target - eye)[:2])
        self.away = {i: float((np.array(o.xyz[:2]) - eye[:2]) @ heading) for i, o in self.obj.items()}
        self.box = {}
        for i, o in self.obj.items():
            low, high, _ = extent(o.parts)
            self.box[i] = (np.asarray(low) * o.scale, np.asarray(high) * o.scale)

    def size(self, i): low, high = self.box[i]; return float(np.prod(high - low)) ** (1 / 3)
    def tall(self, i): low, high = self.box[i]; return float(high[2] - low[2])
    def middle(self, i): o = self.obj[i]; low, high = self.box[i]; return np.array([o.xyz[0], o.xyz[1], o.xyz[2] + (low[2] + high[2]) / 2])

    def distance(self, i, j):
        if self.metric == "space": return float(np.linalg.norm(self.middle(i) - self.middle(j)))
        return math.hypot(self.cx[i] - self.cx[j], self.cy[i] - self.cy[j])

    def word(self, i, attr):
        o = self.obj[i]
        return {"kind": o.kind, "colour": o.colour, "material": o.material, "size": o.size, "texture": o.texture}[attr]

    def hidden(self, i):
        o = self.obj[i]
        return o.texture is not None and (o.texture, o.colour) == (self.scene.ground_texture, self.scene.ground_colour)

    def text(self, i): return next((p.text for p in self.obj[i].parts if p.text), None) or self.obj[i].text or ""

    def supports(self, i):
        out, at = [], self.obj[i].on
        while at is not None and at not in out: out.append(at); at = self.obj[at].on
        return out

    def beneath(self, i, table):
        """Does i stand under the table's top: its base point within the turned rectangle of the top, its own top below it?"""
        t = self.obj[table]
        if t.kind != "table" or i == table: return False
        low, high, _ = extent([p for p in t.parts if p.name == "top"])
        low, high = np.asarray(low) * t.scale, np.asarray(high) * t.scale
        corners = [np.array([math.cos(t.yaw) * x - math.sin(t.yaw) * y, math.sin(t.yaw) * x + math.cos(t.yaw) * y]) + t.xyz[:2]
                   for x, y in ((low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1]))]
        p = np.array(self.obj[i].xyz[:2])
        inside = all((b - a)[0] * (p - a)[1] - (b - a)[1] * (p - a)[0] > 0 for a, b in zip(corners, corners[1:] + corners[:1]))
        return inside and self.obj[i].xyz[2] + self.box[i][1][2] <= t.xyz[2] + low[2] + .01

    def stands(self, relation, i, o):
        """Is i in the relation to o?"""
        if i == o: return False
        a, b = self.obj[i], self.obj[o]
        match relation:
            case "left": return self.cx[i] < self.cx[o]
            case "right": return self.cx[i] > self.cx[o]
            case "front": return self.away[i] < self.away[o]
            case "behind": return self.away[i] > self.away[o]
            case "larger": return self.size(i) > self.size(o)
            case "smaller": return self.size(i) < self.size(o)
            case "taller": return self.tall(i) > self.tall(o)
            case "shorter": return self.tall(i) < self.tall(o)
            case "on": return a.on == o
            case "inside": return a.inside == o
            case "outside": return a.inside != o
            case "under": return self.beneath(i, o)
            case "above": return o in self.supports(i)[1:] or self.beneath(o, i) or any(self.beneath(o, t) for t in self.supports(i)[:1])
            case "below": return self.stands("above", o, i)
            case "next": return a.on == b.on and math.dist(a.xyz[:2], b.xyz[:2]) - sum(float(np.mean((h - l)[:2])) / 2 for l, h in (self.box[i], self.box[o])) < .5
            case "covered": return self.hides(o, i)
        raise AssertionError(relation)

    def hides(self, front, back):
        """Does `front` cover most of what is missing of `back`? Measured by rendering `back` alone."""
        from dataclasses import replace

        from rea2seg.scenes.cast import cast, pack
        if back not in self.alone:
            lonely = replace(self.scene, objects=(replace(self.obj[back], on=None, inside=None),))
            packed = pack([lonely]) # the cast alone: colours and shadows do not matter here
            solid = cast(packed, self.seen.object_ids.shape, "cpu").solid[0]
            self.alone[back] = ((solid >= 0) & (packed.object_id[packed.owner][solid.clamp(min=0)] == back)).numpy()
        alone = self.alone[back]
        lost = alone & ~self.mask[back]
        return lost.sum() > .35 * alone.sum() and (lost & self.mask[front]).sum() > .6 * lost.sum()

    # --- programs as predicates ------------------------------------------------------------------------------------------
    def members(self, program): return [i for i in self.universe if self.holds(i, program)]

    def the(self, program):
        found = self.members(program[1])
        assert len(found) == 1, f"{program} names {found}"
        return found[0]

    def ranked(self, i, k, pool, key):
        """Is i the k-th of the pool when sorted by key?"""
        return i in pool and 1 + sum(key(j) < key(i) for j in pool if j != i) == k

    def holds(self, i, program):
        op, *args = program
        rest = args[-1] if args else None
        if op == "scene" or op == "everything": return True
        if not self.holds(i, rest): return False
        match op:
            case "filter": return self.word(i, args[0]) == args[1]
            case "with": return any(p.name == args[0] and (p.colour or self.obj[i].colour) == args[1] for p in self.obj[i].parts)
            case "purpose": return self.obj[i].kind == USES[args[0]]
            case "letter": return self.text(i)[:1] == args[1] if args[0] == "first" else args[1] in self.text(i)
            case "same": o = self.the(args[1]); return i != o and self.word(i, args[0]) == self.word(o, args[0])
            case "relate": return self.stands(args[0], i, self.the(args[1]))
            case "nth":
                o = self.the(args[2])
                sign = 1 if args[1] == "nearest" else -1
                return i != o and self.ranked(i, args[0], [j for j in self.members(rest) if j != o], lambda j: sign * self.distance(j, o))
            case "closer": a, b = self.the(args[0]), self.the(args[1]); return i not in (a, b) and self.distance(i, a) < self.distance(i, b)
            case "between":
                a, b = self.the(args[0]), self.the(args[1])
                if i in (a, b): return False
                p, q, x = ((self.middle(k)[:2] for k in (a, b, i)) if self.metric == "space" else (np.array([self.cx[k], self.cy[k]]) for k in (a, b, i)))
                return np.dot(x - p, q - p) > 0 and np.dot(x - q, p - q) > 0 and math.degrees(math.acos(np.clip(
                    np.dot(p - x, q - x) / np.linalg.norm(p - x) / np.linalg.norm(q - x), -1, 1))) > 100
            case "rank":
                key = {"left": lambda j: self.cx[j], "right": lambda j: -self.cx[j], "front": lambda j: self.away[j], "back": lambda j: -self.away[j],
                       "largest": lambda j: -self.size(j), "smallest": self.size, "tallest": lambda j: -self.tall(j), "shortest": self.tall}[args[1]]
                return self.ranked(i, args[0], self.members(rest), key)
            case "most" | "fewest":
                count = lambda j: sum(self.stands(args[0], x, j) for x in self.members(args[1]))
                sign = -1 if op == "most" else 1
                return self.ranked(i, 1, self.members(rest), lambda j: sign * count(j))
            case "having": return sum(self.stands(args[1], x, i) for x in self.members(args[2])) == args[0]
            case "commonest":
                pool = [self.word(j, args[0]) for j in self.members(rest)]
                best = max(pool.count(w) for w in pool)
                return pool.count(self.word(i, args[0])) == best
            case "letters":
                sign = -1 if args[0] == "most" else 1
                count = lambda j: len([c for c in self.text(j) if c.isalpha()])
                return self.ranked(i, 1, [j for j in self.members(rest) if count(j)], lambda j: sign * count(j))
            case "camouflaged": return self.hidden(i)
            case "thin": return self.obj[i].kind in THIN
        raise AssertionError(op)

    def answers(self, program):
        """All objects that satisfy a whole program, and the part asked for."""
        part = program[1] if program[0] == "part" else None
        head = program[2] if part else program
        found = self.members(head[1])
        if part: found = [i for i in found if part in [p.name for p in self.obj[i].parts]]
        if head[0] == "the": assert len(found) == 1, f"{len(found)} answers {found} to {program}"
        else: assert len(found) > 1, f"a set of {found}: {program}"
        return found, part


def readings(scene: Scene, seen: Rendered, least_px: int = 60):
    """The readings: slivers and camouflaged things counted or not, distances in space or in the picture."""
    area, first = seen.object_ids.size / 256**2, World(scene, seen)
    out = []
    for (px, hidden), metric in product(((1, True), (least_px * area, True), (least_px * area, False)), ("space", "picture")):
        world = copy(first)
        world.metric, world.camouflaged = metric, hidden
        world.universe = [i for i in world.obj if world.px[i] >= px and (hidden or not world.hidden(i))]
        out.append(world)
    return out


def check(worlds: list[World], program, answer, mask: np.ndarray):
    """Every reading has exactly one answer: the given one, whose pixels are the mask."""
    seen = worlds[0].seen
    for world in worlds:
        if "everything" in str(program) and not world.camouflaged: continue # the question is about what is hard to see
        found, part = world.answers(program)
        assert {(i, part) for i in found} == {tuple(a) for a in answer}, f"{program}: brute force finds {found} {part}, given is {answer}"
    pixels = np.zeros(mask.shape, bool)
    for id, part in answer:
        pixels |= (seen.object_ids == id) if part is None else (seen.part_ids >= 0) & np.isin(seen.part_ids, [k for k, p in enumerate(seen.parts) if p == (id, part)])
    np.testing.assert_array_equal(pixels, mask)
    assert mask.any()
