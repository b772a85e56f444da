"""The first place of every block leads; rows of another kind are another block."""

from __future__ import annotations

from moe_peft.place import Place
from moe_peft.places.sharing import share_decisions


def test_the_first_place_of_a_parent_leads_the_others_that_read_the_same_rows():
    names = ["l.0.mlp.gate", "l.0.mlp.up", "l.1.mlp.gate", "l.1.mlp.up", "l.1.q"]
    places = [Place(name, 4, 4) for name in names]
    places += [
        Place("c.q", 4, 4),
        Place("c.k", 4, 4, rows="encoder_states"),
        Place("c.v", 4, 4, rows="encoder_states"),
    ]
    shared = {place.name: (place.block, place.leader) for place in share_decisions(places)}
    assert shared == {
        "l.0.mlp.gate": ("l.0.mlp:tokens", None),
        "l.0.mlp.up": ("l.0.mlp:tokens", "l.0.mlp.gate"),
        "l.1.mlp.gate": ("l.1.mlp:tokens", None),
        "l.1.mlp.up": ("l.1.mlp:tokens", "l.1.mlp.gate"),
        "l.1.q": (None, None),
        "c.q": (None, None),
        "c.k": ("c:encoder_states", None),
        "c.v": ("c:encoder_states", "c.k"),
    }
