"""Stories of days, hours, distances, ages and rates."""

from __future__ import annotations

from fox_edge.nano.family import Family

TIME: tuple[Family, ...] = (
    Family(
        "per_day",
        "a=2..15; d=2..12",
        (
            "{N} reads {a} pages a day. How many pages does {he} read in {d} days?",
            "A shop sells {a} {wares} every day. How many {wares} does it sell in {d} days?",
        ),
        ("In {d} days that is [t=a*d].",),
    ),
    Family(
        "per_week",
        "a=2..15; w=2..4",
        (
            "{N} makes {a} {craft} a day. How many {craft} does {he} make in {w} weeks?",
            "{N} (walks|runs|rides) {a} miles every day. How many miles is that in {w} weeks?",
        ),
        ("{w} weeks have [d=w*7] days.", "That makes [t=a*d]."),
    ),
    Family(
        "days_to_finish",
        "a=2..12; q=2..15; t=a*q",
        (
            "A book has {t} pages. {N} reads {a} pages a day. How many days does {he} need?",
            "{N} has to make {t} {craft} and makes {a} a day. How many days does it take?",
        ),
        ("It takes [d=t/a] days.",),
    ),
    Family(
        "rest_of_book",
        "a=2..50; d=2..10; q=2..12; t=a+d*q",
        (
            "A book has {t} pages. {N} has read {a}. {He} reads the rest in {d} days. "
            "How many pages a day does {he} read?",
            "{N} must pick {t} apples. {He} has picked {a} and needs {d} hours for the rest. "
            "How many does {he} pick per hour?",
        ),
        ("The rest is [r=t-a].", "That is [e=r/d] each."),
    ),
    Family(
        "distance",
        "s=2..20; h=2..9",
        (
            "A boat goes {s} miles an hour. How many miles does it go in {h} hours?",
            "{N} rides a bike at {s} miles per hour for {h} hours. How far does {he} ride, in miles?",
        ),
        ("The distance is [t=s*h] miles.",),
    ),
    Family(
        "two_legs_of_a_trip",
        "s=2..12; h=2..9; u=2..12; k=2..9",
        (
            "{N} drives {h} hours at {s} miles an hour, then {k} hours at {u} miles an hour. "
            "How many miles does {he} drive in all?",
            "A train goes {s} miles an hour for {h} hours and {u} miles an hour for {k} hours. "
            "How many miles does it go in total?",
        ),
        ("First it is [f=h*s] miles.", "Then it is [g=k*u] miles.", "In total it is [t=f+g] miles."),
    ),
    Family(
        "hours_of_travel",
        "s=2..12; q=2..12; t=s*q",
        (
            "{N} walks {t} miles at {s} miles an hour. How many hours does it take?",
            "A ship must go {t} miles. It goes {s} miles per hour. How many hours does it need?",
        ),
        ("It takes [h=t/s] hours.",),
    ),
    Family(
        "round_trip",
        "a=2..20; d=2..5",
        (
            "{N} lives {a} miles from work. {He} drives there and back on {d} days. How many miles is that?",
            "The way to the {group} is {a} miles. {N} goes there and back {d} times. "
            "How many miles does {he} go?",
        ),
        ("There and back is [r=a*2] miles.", "In all that is [t=r*d] miles."),
    ),
    Family(
        "age_later",
        "a=5..50; y=2..30",
        (
            "{N} is {a} years old. How old will {he} be in {y} years?",
            "{N} is {a} now. What will {his} age be {y} years from now?",
        ),
        ("{N} will be [t=a+y] years old.",),
    ),
    Family(
        "age_of_other",
        "b=2..15; k=2..4; y=2..15",
        (
            "{N} is {b} years old. {M} is {k} times as old. How old will {M} be in {y} years?",
            "{M} is {k} times as old as {N}, who is {b}. What will the age of {M} be in {y} years?",
        ),
        ("{M} is [m=b*k] years old.", "In {y} years that will be [t=m+y]."),
    ),
    Family(
        "age_difference",
        "b=3..40; d=2..30; y=2..20",
        (
            "{M} is {d} years older than {N}. {N} is {b}. How old will {M} be in {y} years?",
            "{N} is {b} years old and {M} is {d} years older. How old will {M} be {y} years from now?",
        ),
        ("{M} is [m=b+d] years old.", "In {y} years that will be [t=m+y]."),
    ),
    Family(
        "minutes_of_tasks",
        "a=5..45; b=5..45; c=5..45",
        (
            "{N} cooks for {a} minutes, cleans for {b} minutes and reads for {c} minutes. "
            "How many minutes is that in all?",
            "A film has three parts of {a}, {b} and {c} minutes. How many minutes long is it?",
        ),
        ("The first two take [s=a+b] minutes.", "In all that is [t=s+c] minutes."),
    ),
    Family(
        "minutes_each",
        "a=2..12; m=2..12; b=5..40",
        (
            "{N} solves {a} puzzles in {m} minutes each and then rests {b} minutes. How many minutes pass?",
            "It takes {m} minutes to paint a mask and {b} minutes to clean up. "
            "How many minutes does it take to paint {a} masks and clean up?",
        ),
        ("The work takes [w=a*m] minutes.", "In all that is [t=w+b] minutes."),
    ),
    Family(
        "feed_animals",
        "a=2..12; b=2..6; d=2..7",
        (
            "Each of {a} {animals} eats {b} pounds of food a day. How many pounds do they eat in {d} days?",
            "{N} has {a} {pets}. Each gets {b} snacks a day. How many snacks do they get in {d} days?",
        ),
        ("In one day they get [e=a*b].", "In {d} days that is [t=e*d]."),
    ),
    Family(
        "supply_lasts",
        "a=2..6; b=2..5; q=2..10; t=a*b*q",
        (
            "{N} has {a} {pets}. Each one eats {b} cups a day. How many days do {t} cups last?",
            "A farm has {t} bales of hay. Each of {a} {animals} eats {b} a day. "
            "How many days does the hay last?",
        ),
        ("In one day they eat [e=a*b].", "It lasts [r=t/e] days."),
    ),
    Family(
        "bus_stops",
        "b=2..15; c=2..15; a=b+c; f=2..20",
        (
            "A bus has {a} people. At a stop {b} get off and {f} get on. How many people are on the bus now?",
            "{a} {people} are in a {group}. {b} leave and {f} come. How many are there now?",
        ),
        ("When {b} leave, [s=a-b] stay.", "With {f} more there are [t=s+f]."),
    ),
    Family(
        "growth",
        "a=5..60; g=2..12; w=2..8",
        (
            "A plant is {a} inches tall and grows {g} inches a week. How tall is it after {w} weeks?",
            "The water in a pool is {a} inches deep and rises {g} inches an hour. "
            "How deep is it after {w} hours?",
        ),
        ("It rises [r=g*w] inches.", "Then it is at [t=a+r] inches."),
    ),
    Family(
        "draining",
        "g=2..12; w=2..8; r=2..50; a=g*w+r",
        (
            "A tank holds {a} gallons and loses {g} gallons an hour. "
            "How many gallons are left after {w} hours?",
            "A pile has {a} bricks. {N} takes {g} bricks an hour. How many bricks are left after {w} hours?",
        ),
        ("It loses [s=g*w].", "There are [left=a-s] left."),
    ),
    Family(
        "rectangle",
        "a=2..20; b=2..20",
        (
            "A garden is {a} feet long and {b} feet wide. How many feet of fence go around it?",
            "{N} walks once around a field of {a} by {b} yards. How many yards does {he} walk?",
        ),
        ("Length and width make [s=a+b].", "Around it is [t=s*2]."),
    ),
    Family(
        "area_cost",
        "a=2..9; b=2..9; p=2..5",
        (
            "A floor is {a} feet by {b} feet. A square foot of tile costs ${p}. How much does the tile cost?",
            "{N} paints a wall of {a} by {b} feet. Paint costs ${p} per square foot. How much does {he} pay?",
        ),
        ("The area is [s=a*b] square feet.", "It costs [$t=s*p]."),
    ),
    Family(
        "two_day_run",
        "a=2..30; d=2..15",
        (
            "{N} runs {a} laps on Monday and {d} more than that on Tuesday. "
            "How many laps does {he} run in all?",
            "{N} wrote {a} letters in May. In June {he} wrote {d} more than in May. "
            "How many letters did {he} write in all?",
        ),
        ("The second time it was [m=a+d].", "In all that is [t=a+m]."),
    ),
    Family(
        "machine_rate",
        "m=2..9; q=2..10; t=m*q; k=2..12",
        (
            "A machine makes {t} {wares} in {m} hours. How many {wares} does it make in {k} hours?",
            "{N} types {t} lines in {m} minutes. How many lines does {he} type in {k} minutes?",
        ),
        ("In one it is [e=t/m].", "In {k} it is [s=e*k]."),
    ),
)
