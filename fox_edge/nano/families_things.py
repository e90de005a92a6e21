"""Stories of counting, sharing and comparing things."""

from __future__ import annotations

from fox_edge.nano.family import Family

THINGS: tuple[Family, ...] = (
    Family(
        "get_more",
        "a=3..99; b=2..60",
        (
            "{N} has {a} {things}. {He} (buys|finds|gets) {b} more. How many {things} does {N} have now?",
            "{N} had {a} {things} and then {M} gave {him} {b} more. How many {things} does {N} have?",
            "There were {a} {things} on a table. {N} (put|laid) {b} more there. "
            "How many {things} are there now?",
        ),
        ("There are [t=a+b] {things} now.",),
    ),
    Family(
        "give_away",
        "b=2..60; c=2..60; a=b+c",
        (
            "{N} has {a} {things}. {He} gives {b} of them to {M}. How many {things} does {N} have left?",
            "{N} had {a} {things} but (lost|sold|dropped) {b}. How many {things} are left?",
            "Of the {a} {things} in a {box}, {N} takes {b}. How many {things} remain?",
        ),
        ("[r=a-b] {things} are left.",),
    ),
    Family(
        "two_people_total",
        "a=3..80; b=3..80",
        (
            "{N} has {a} {things} and {M} has {b}. How many {things} do they have together?",
            "{N} (collected|found) {a} {things}. {M} got {b} {things}. How many did they get in all?",
        ),
        ("Together they have [t=a+b] {things}.",),
    ),
    Family(
        "twice_as_many",
        "a=3..50",
        (
            "{N} has {a} {things}. {M} has twice as many. How many {things} do they have together?",
            "{M} has twice as many {things} as {N}, who has {a}. How many {things} do the two have in total?",
        ),
        ("{M} has [m=a*2] {things}.", "Together they have [t=a+m] {things}."),
    ),
    Family(
        "times_as_many",
        "a=2..15; k=3..6",
        (
            "{N} has {a} {things}. {M} has {k} times as many. How many {things} do they have together?",
            "{M} (made|found|has) {k} times as many {things} as {N}. {N} has {a}. "
            "How many are there in total?",
        ),
        ("{M} has [m=a*k] {things}.", "Together they have [t=a+m] {things}."),
    ),
    Family(
        "half_as_many",
        "h=2..40; a=h*2",
        (
            "{N} sold {a} {things} on (Monday|Friday) and half as many the next day. "
            "How many did {he} sell in all?",
            "{N} has {a} {things}. {M} has half as many. How many {things} do they have together?",
        ),
        ("Half of {a} is [m=a/2].", "In total there are [t=a+m] {things}."),
    ),
    Family(
        "more_than",
        "a=3..60; b=2..30",
        (
            "{N} has {a} {things}. {M} has {b} more than {N}. How many {things} do they have together?",
            "{M} has {b} more {things} than {N}. If {N} has {a}, how many {things} do both have in total?",
        ),
        ("{M} has [m=a+b] {things}.", "Together they have [t=a+m] {things}."),
    ),
    Family(
        "fewer_than",
        "b=2..30; c=2..50; a=b+c",
        (
            "{N} has {a} {things}. {M} has {b} fewer than {N}. How many {things} do they have together?",
            "{M} (picked|found) {b} fewer {things} than {N}, who got {a}. "
            "How many {things} did both get in total?",
        ),
        ("{M} has [m=a-b] {things}.", "Together they have [t=a+m] {things}."),
    ),
    Family(
        "difference",
        "b=3..70; d=2..40; a=b+d",
        (
            "{N} has {a} {things} and {M} has {b}. How many more {things} does {N} have than {M}?",
            "{M} has {b} {things}. {N} has {a}. How many fewer {things} does {M} have?",
        ),
        ("The difference is [r=a-b] {things}.",),
    ),
    Family(
        "boxes_of",
        "a=2..12; b=2..15",
        (
            "{N} has {a} {boxes} with {b} {things} in each. How many {things} does {he} have?",
            "There are {a} {boxes} on a shelf. Each {box} holds {b} {things}. How many {things} are there?",
        ),
        ("There are [t=a*b] {things}.",),
    ),
    Family(
        "boxes_and_loose",
        "a=2..10; b=2..12; c=2..40",
        (
            "{N} has {a} {boxes} of {b} {things} and {c} loose {things}. How many {things} does {he} have?",
            "Each of {a} {boxes} holds {b} {things}. {N} also has {c} more {things}. "
            "How many are there in all?",
        ),
        ("The {boxes} hold [p=a*b] {things}.", "In all there are [t=p+c] {things}."),
    ),
    Family(
        "boxes_minus",
        "a=2..10; b=3..12; c=2..a*b-1",
        (
            "{N} buys {a} {boxes} of {b} {things}. {He} gives {c} {things} to {M}. "
            "How many does {he} have left?",
            "{N} had {a} {boxes} with {b} {things} each. {c} {things} were (lost|used|broken). "
            "How many are left?",
        ),
        ("{N} had [p=a*b] {things}.", "[r=p-c] {things} are left."),
    ),
    Family(
        "share_evenly",
        "k=2..9; q=2..15; a=k*q",
        (
            "{N} shares {a} {things} evenly among {k} friends. How many {things} does each friend get?",
            "{a} {things} are split equally between {k} people. How many {things} does each one get?",
        ),
        ("Each gets [r=a/k] {things}.",),
    ),
    Family(
        "pack_boxes",
        "k=2..10; q=2..12; a=k*q",
        (
            "{N} packs {a} {things} into {boxes} of {k}. How many {boxes} does {he} need?",
            "A {box} holds {k} {things}. How many {boxes} are needed for {a} {things}?",
        ),
        ("{N} needs [r=a/k] {boxes}.",),
    ),
    Family(
        "pool_and_share",
        "k=2..6; q=3..15; a=2..k*q-1; b=k*q-a",
        (
            "{N} has {a} {things} and {M} has {b}. They share all of them evenly among {k} friends. "
            "How many {things} does each friend get?",
            "{N} (bakes|makes|brings) {a} {things} and {M} {b}. They put them equally into {k} {boxes}. "
            "How many {things} are in each {box}?",
        ),
        ("Together they have [t=a+b] {things}.", "Each gets [r=t/k] {things}."),
    ),
    Family(
        "give_to_two",
        "b=2..30; c=2..30; r=2..50; a=b+c+r",
        (
            "{N} had {a} {things}. {He} gave {b} to {M} and {c} to {his} sister. "
            "How many does {he} have left?",
            "From {a} {things}, {N} uses {b} in the morning and {c} in the evening. "
            "How many {things} are left?",
        ),
        ("{b} and {c} make [g=b+c] {things}.", "[left=a-g] {things} are left."),
    ),
    Family(
        "lose_and_find",
        "b=2..30; c=2..40; a=b+c; f=2..40",
        (
            "{N} had {a} {things}. {He} lost {b} and then found {f}. How many {things} does {N} have now?",
            "A {box} had {a} {things}. {N} took {b} out and put {f} in. "
            "How many {things} are in the {box} now?",
        ),
        ("First there were [s=a-b] left.", "Now there are [t=s+f] {things}."),
    ),
    Family(
        "rows_and_columns",
        "a=3..12; b=3..12; c=2..a*b-1",
        (
            "A hall has {a} rows of {b} chairs. {c} chairs are taken. How many chairs are free?",
            "{N} sets up {a} rows with {b} chairs in each row. {c} {people} sit down. "
            "How many chairs stay empty?",
        ),
        ("There are [p=a*b] chairs.", "[r=p-c] chairs are free."),
    ),
    Family(
        "three_kinds",
        "a=2..40; b=2..40; c=2..40",
        (
            "A {group} has {a} red, {b} blue and {c} green {things}. How many {things} does it have?",
            "{N} has {a} red {things}, {b} blue ones and {c} green ones. "
            "How many {things} does {he} have in all?",
        ),
        ("Red and blue make [s=a+b].", "In all there are [t=s+c] {things}."),
    ),
    Family(
        "find_the_rest",
        "a=2..40; b=2..40; r=2..40; t=a+b+r",
        (
            "Of {t} {things}, {a} are red, {b} are blue and the rest are green. How many are green?",
            "{N} has {t} {things}: {a} big ones, {b} small ones, and the others are broken. "
            "How many are broken?",
        ),
        ("The first two kinds make [s=a+b].", "The rest are [g=t-s]."),
    ),
    Family(
        "legs",
        "a=2..15; b=2..15",
        (
            "A farm has {a} cows and {b} hens. How many legs do they have altogether?",
            "{N} sees {a} dogs and {b} birds. How many legs do the animals have in all?",
        ),
        ("Four legs each make [f=a*4].", "Two legs each make [s=b*2].", "In all there are [t=f+s] legs."),
    ),
    Family(
        "fraction_left",
        "k=2..5; q=2..15; a=k*q",
        (
            "{N} had {a} {things} and gave 1/{k} of them to {M}. How many {things} does {N} have left?",
            "1/{k} of the {a} {things} in a {box} are broken. How many {things} are not broken?",
        ),
        ("1/{k} of {a} is [p=a/k].", "[r=a-p] {things} are left."),
    ),
    Family(
        "missing_addend",
        "a=2..60; r=2..60; t=a+r",
        (
            "{N} wants {t} {things} and has {a}. How many more {things} does {he} need?",
            "{N} has {a} {things}. {M} gave {him} some more, and now {he} has {t}. How many did {M} give?",
        ),
        ("It is [m=t-a] {things}.",),
    ),
    Family(
        "teams",
        "k=2..8; q=2..12; a=2..k*q-1; b=k*q-a",
        (
            "{a} boys and {b} girls form teams of {k}. How many teams are there?",
            "A {group} has {a} boys and {b} girls. They sit at tables of {k}. How many tables do they fill?",
        ),
        ("There are [t=a+b] children.", "That makes [r=t/k] groups."),
    ),
    Family(
        "chain_of_three",
        "a=2..20; k=2..4; d=2..20",
        (
            "{N} has {a} {things}. {M} has {k} times as many, and Alex has {d} more than {M}. "
            "How many {things} does Alex have?",
            "Alex has {d} more {things} than {M}. {M} has {k} times as many as {N}, who has {a}. "
            "How many {things} does Alex have?",
        ),
        ("{M} has [m=a*k] {things}.", "Alex has [x=m+d] {things}."),
    ),
)
