"""Stories of prices, wages, savings and change, in whole dollars."""

from __future__ import annotations

from fox_edge.nano.family import Family

MONEY: tuple[Family, ...] = (
    Family(
        "buy_several",
        "a=2..12; p=2..15",
        (
            "A {thing} costs ${p}. How much do {a} {wares} cost?",
            "{N} (buys|orders|sells) {a} {wares} at ${p} each. How many dollars is that in total?",
        ),
        ("The total is [$t=a*p].",),
    ),
    Family(
        "change",
        "a=2..9; p=2..10; m=a*p+1..a*p+30",
        (
            "{N} buys {a} {wares} for ${p} each and pays with ${m}. How much change does {he} get?",
            "A {thing} costs ${p}. {N} has ${m} and buys {a} {wares}. How many dollars does {he} have left?",
        ),
        ("The {wares} cost [$t=a*p].", "{N} has [$r=m-t] left."),
    ),
    Family(
        "two_kinds_of_goods",
        "a=2..9; p=2..10; b=2..9; q=2..10",
        (
            "{N} buys {a} {food} at ${p} each and {b} {drink} at ${q} each. How much does {he} pay in total?",
            "{food} cost ${p} each and {drink} cost ${q} each. "
            "How much are {a} {food} and {b} {drink} together?",
        ),
        ("The {food} cost [$f=a*p].", "The {drink} cost [$d=b*q].", "In total that is [$t=f+d]."),
    ),
    Family(
        "wage",
        "h=2..12; w=5..15",
        (
            "{N} earns ${w} an hour. How much does {he} earn in {h} hours?",
            "{N} works {h} hours for ${w} per hour. How many dollars does {he} earn?",
        ),
        ("{N} earns [$t=h*w].",),
    ),
    Family(
        "wage_and_tips",
        "h=2..10; w=5..12; b=5..50",
        (
            "{N} earns ${w} an hour and works {h} hours. {He} also gets ${b} in tips. "
            "How much does {he} earn in all?",
            "{N} worked {h} hours at ${w} per hour and got a bonus of ${b}. How much money did {he} make?",
        ),
        ("The work pays [$p=h*w].", "In all {N} gets [$t=p+b]."),
    ),
    Family(
        "save_for_gift",
        "a=5..60; w=2..12; q=2..10; c=a+w*q",
        (
            "{N} wants a {gift} that costs ${c}. {He} has ${a} and saves ${w} a week. "
            "In how many weeks can {he} buy it?",
            "A {gift} costs ${c}. {N} already has ${a} and puts aside ${w} every week. "
            "How many weeks does {he} need?",
        ),
        ("{N} still needs [$n=c-a].", "That takes [r=n/w] weeks."),
    ),
    Family(
        "money_left",
        "b=2..40; c=2..40; r=2..50; a=b+c+r",
        (
            "{N} has ${a}. {He} spends ${b} on food and ${c} on a {thing}. "
            "How much money does {he} have left?",
            "{N} got ${a} from {M}. {He} paid ${b} for a {thing} and ${c} for a book. "
            "How many dollars are left?",
        ),
        ("{N} spends [$s=b+c].", "{He} has [$left=a-s] left."),
    ),
    Family(
        "discount",
        "d=2..30; r=5..60; p=d+r",
        (
            "A {thing} costs ${p}, but today it is ${d} cheaper. How much does it cost today?",
            "{N} has a coupon of ${d} for a {thing} of ${p}. How much does {he} pay?",
        ),
        ("The price is [$left=p-d].",),
    ),
    Family(
        "discount_each",
        "p=6..20; d=1..p-3; a=2..9",
        (
            "{wares} cost ${p} each, but are ${d} off today. How much do {a} {wares} cost today?",
            "{N} gets ${d} off each {thing}. A {thing} costs ${p}. How much does {he} pay for {a} {wares}?",
        ),
        ("Each {thing} costs [$q=p-d].", "In all that is [$t=a*q]."),
    ),
    Family(
        "half_price",
        "h=2..15; p=h*2; a=2..9",
        (
            "A {thing} costs ${p}. Today everything is half price. How much do {a} {wares} cost?",
            "{wares} of ${p} each are sold at half price. How much does {N} pay for {a} of them?",
        ),
        ("Half price is [$q=p/2].", "In all that is [$t=a*q]."),
    ),
    Family(
        "split_bill",
        "k=2..6; q=5..20; a=2..k*q-1; b=k*q-a",
        (
            "{k} friends eat for ${a} and drink for ${b}. They split the bill evenly. "
            "How much does each one pay?",
            "A meal costs ${a} and the drinks ${b}. {k} people share the cost equally. "
            "What does each person pay?",
        ),
        ("The bill is [$t=a+b].", "Each one pays [$e=t/k]."),
    ),
    Family(
        "price_of_one",
        "k=2..10; q=2..12; t=k*q",
        (
            "{k} {wares} cost ${t}. How much does one {thing} cost?",
            "{N} paid ${t} for {k} {wares}. What was the price of each {thing}?",
        ),
        ("One {thing} costs [$e=t/k].",),
    ),
    Family(
        "price_of_more",
        "k=2..6; q=2..9; t=k*q; b=2..12",
        (
            "{k} {wares} cost ${t}. How much do {b} {wares} cost?",
            "{N} paid ${t} for {k} {wares}. How much would {he} pay for {b} {wares}?",
        ),
        ("One {thing} costs [$e=t/k].", "{b} of them cost [$s=e*b]."),
    ),
    Family(
        "how_many_can_buy",
        "p=2..12; q=2..12; m=p*q",
        (
            "{N} has ${m}. A {thing} costs ${p}. How many {wares} can {he} buy?",
            "{wares} cost ${p} each. How many does {N} get for ${m}?",
        ),
        ("{N} can buy [r=m/p] {wares}.",),
    ),
    Family(
        "spend_then_buy",
        "s=2..40; p=2..9; q=2..10; m=s+p*q",
        (
            "{N} has ${m}. {He} spends ${s} on a {gift}. "
            "How many {drink} at ${p} each can {he} buy with the rest?",
            "{N} pays ${s} out of ${m} for a game and buys {food} at ${p} each with the rest. "
            "How many does {he} get?",
        ),
        ("{N} has [$left=m-s] left.", "That buys [r=left/p]."),
    ),
    Family(
        "profit",
        "a=2..9; p=5..15; c=2..a*p-1",
        (
            "{N} sells {a} {craft} for ${p} each. The material cost ${c}. How much profit does {he} make?",
            "{N} spent ${c} on paint and sold {a} {craft} at ${p} each. How much money did {he} gain?",
        ),
        ("The sales bring [$s=a*p].", "The profit is [$r=s-c]."),
    ),
    Family(
        "profit_each",
        "c=2..10; g=1..10; p=c+g; a=2..12",
        (
            "{N} buys {wares} for ${c} and sells them for ${p}. What is {his} profit on {a} {wares}?",
            "It costs {N} ${c} to make a {thing}, which sells for ${p}. "
            "How much does {he} gain on {a} {wares}?",
        ),
        ("Each {thing} brings [$e=p-c].", "In all that is [$t=e*a]."),
    ),
    Family(
        "tickets_for_family",
        "a=2..5; p=5..12; b=2..6; q=2..5",
        (
            "Tickets cost ${p} for adults and ${q} for children. "
            "How much do {a} adults and {b} children pay?",
            "{a} adults and {b} children visit a museum. An adult pays ${p}, a child ${q}. "
            "How much do they pay?",
        ),
        ("The adults pay [$f=a*p].", "The children pay [$d=b*q].", "In total they pay [$t=f+d]."),
    ),
    Family(
        "weekly_savings_total",
        "w=2..12; k=2..10; a=5..60",
        (
            "{N} has ${a} and saves ${w} a week. How much does {he} have after {k} weeks?",
            "{N} saves ${w} every week for {k} weeks. {He} started with ${a}. "
            "How much money does {he} have now?",
        ),
        ("{N} saves [$s=w*k].", "Now {he} has [$t=a+s]."),
    ),
)
