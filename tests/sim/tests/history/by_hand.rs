//! One history for each thing that is allowed, and one for each that is not. Blocks, ids and operations are small numbers.

use galleonfs_sim::history::Rule;

pub const GOOD: &[(&str, &str)] = &[
    ("nothing happened", ""),
    ("what was never written is zeros", "1 read 1\n1 ok zero\n"),
    (
        "a read sees what was written before",
        "1 write 1 1\n1 ok\n2 read 1\n2 ok 1\n",
    ),
    (
        "a read beside a write sees the old one",
        "1 write 1 1\n2 read 1\n2 ok zero\n1 ok\n3 read 1\n3 ok 1\n",
    ),
    (
        "a read beside a write sees the new one",
        "1 write 1 1\n2 read 1\n2 ok 1\n1 ok\n",
    ),
    (
        "two writes at a time end in the order that the reads saw",
        "1 write 1 1\n2 write 1 2\n1 ok\n2 ok\n3 read 1\n3 ok 1\n4 read 1\n4 ok 1\n",
    ),
    (
        "reads at a time may disagree while a write is under way",
        "1 write 1 1\n2 read 1\n3 read 1\n3 ok 1\n2 ok zero\n1 ok\n",
    ),
    (
        "a write that failed did nothing",
        "1 write 1 1\n1 fail\n2 read 1\n2 ok zero\n",
    ),
    (
        "a write of which nobody knows may never land",
        "1 write 1 1\n1 info\n2 read 1\n2 ok zero\n3 read 1\n3 ok zero\n",
    ),
    ("it may have landed", "1 write 1 1\n1 info\n2 read 1\n2 ok 1\n"),
    (
        "it may land late",
        "1 write 1 1\n1 info\n2 write 1 2\n2 ok\n3 read 1\n3 ok 2\n4 read 1\n4 ok 1\n",
    ),
    (
        "it may have landed before the next epoch",
        "1 write 1 1\n1 info\nepoch\n2 read 1\n2 ok 1\n",
    ),
    (
        "a write that is still under way may land in the next epoch",
        "1 write 1 1\nepoch\n2 read 1\n2 ok zero\n3 read 1\n3 ok 1\n1 ok\n",
    ),
    (
        "a new epoch keeps what was completed",
        "1 write 1 1\n1 ok\nepoch\n2 read 1\n2 ok 1\n",
    ),
    (
        "a crash may take what no flush covers",
        "1 write 1 1\n1 ok\ncrash\n2 read 1\n2 ok zero\n",
    ),
    ("a crash may leave it", "1 write 1 1\n1 ok\ncrash\n2 read 1\n2 ok 1\n"),
    (
        "a crash may leave what was under way",
        "1 write 1 1\ncrash\n2 read 1\n2 ok 1\n",
    ),
    (
        "a crash may take what a guest has read",
        "1 write 1 1\n1 ok\n2 read 1\n2 ok 1\ncrash\n3 read 1\n3 ok zero\n",
    ),
    (
        "a crash may leave any write behind the flush",
        "1 write 1 1\n1 ok\n2 flush\n2 ok\n3 write 1 2\n3 ok\n4 write 1 3\n4 ok\ncrash\n5 read 1\n5 ok 2\n",
    ),
    (
        "blocks are on their own in a crash",
        "1 write 1 1\n1 ok\n2 write 2 2\n2 ok\ncrash\n3 read 1\n3 ok zero\n4 read 2\n4 ok 2\n",
    ),
    (
        "a flush does not cover what was completed after it was asked for",
        "1 write 1 1\n2 flush\n1 ok\n2 ok\ncrash\n3 read 1\n3 ok zero\n",
    ),
    (
        "a flush that did not end covers nothing",
        "1 write 1 1\n1 ok\n2 flush\ncrash\n3 read 1\n3 ok zero\n",
    ),
    (
        "a flush that failed covers nothing",
        "1 write 1 1\n1 ok\n2 flush\n2 fail\ncrash\n3 read 1\n3 ok zero\n",
    ),
    (
        "what was left by two crashes is what was left by the first",
        "1 write 1 1\n1 ok\n2 write 1 2\n2 ok\npower-loss\n3 read 1\n3 ok 1\ncrash\n4 read 1\n4 ok 1\n",
    ),
    (
        "what nobody looked at between two crashes is settled after the second",
        "1 write 1 1\n1 ok\n2 write 1 2\n2 ok\ncrash\n3 write 1 3\n3 ok\ncrash\n4 read 1\n4 ok 1\n",
    ),
    (
        "writes at a time, one of them flushed, leave either",
        "1 write 1 1\n2 write 1 2\n1 ok\n3 flush\n3 ok\ncrash\n4 read 1\n4 ok 2\n",
    ),
    ("what FUA wrote survives", "1 fua 1 1\n1 ok\ncrash\n2 read 1\n2 ok 1\n"),
    (
        "what was written after FUA may survive",
        "1 fua 1 1\n1 ok\n2 write 1 2\ncrash\n3 read 1\n3 ok 2\n",
    ),
    (
        "a discard leaves zeros",
        "1 write 1 1\n1 ok\n2 discard 1\n2 ok\n3 read 1\n3 ok zero\n",
    ),
    (
        "a discard may be undone by a crash",
        "1 write 1 1\n1 ok\n2 discard 1\n2 ok\ncrash\n3 read 1\n3 ok 1\n",
    ),
    (
        "zeros after a crash come from the discard",
        "1 write 1 1\n1 ok\n2 flush\n2 ok\n3 discard 1\n3 ok\ncrash\n4 read 1\n4 ok zero\n",
    ),
    (
        "zeros come from either discard",
        "1 discard 1\n2 write 1 1\n3 discard 1\n1 ok\n4 read 1\n4 ok zero\n5 read 1\n5 ok 1\n6 read 1\n6 ok zero\n2 ok\n3 ok\n",
    ),
    (
        "zeros come from the begin, and then from a discard",
        "1 read 1\n1 ok zero\n2 write 1 1\n2 ok\n3 discard 1\n4 read 1\n4 ok 1\n5 read 1\n5 ok zero\n3 ok\n",
    ),
    (
        "a read of a damaged block fails",
        "damaged 1\n1 read 1\n1 fail\nmended 1\n2 read 1\n2 ok zero\n",
    ),
    (
        "a read that began in time fails",
        "damaged 1\n1 read 1\nmended 1\n1 fail\n",
    ),
    (
        "a snapshot shows what was there",
        "1 write 1 1\n1 ok\n2 snapshot 1\n2 ok\n3 write 1 2\n3 ok\n4 snapshot-read 1 1\n4 ok 1\n5 read 1\n5 ok 2\n",
    ),
    (
        "a snapshot keeps what a crash takes from the volume",
        "1 write 1 1\n1 ok\n2 snapshot 1\n2 ok\ncrash\n3 read 1\n3 ok zero\n4 snapshot-read 1 1\n4 ok 1\n",
    ),
    (
        "a snapshot beside writes shows one moment",
        "1 snapshot 1\n2 write 1 1\n2 ok\n3 write 2 2\n3 ok\n1 ok\n4 snapshot-read 1 1\n4 ok 1\n5 snapshot-read 1 2\n5 ok zero\n",
    ),
    (
        "copies are equal and what was written last",
        "1 write 1 1\n1 ok\ncopy 1 1 1.1 1\ncopy 2 1 1.1 1\ncopy 1 2 0.0 zero\ncopy 2 2 0.0 zero\n",
    ),
];

pub const BAD: &[(&str, Rule, &str)] = &[
    (
        "a read misses what was completed",
        Rule::A,
        "1 write 1 1\n1 ok\n2 read 1\n2 ok zero\n",
    ),
    (
        "a read shows what was replaced",
        Rule::A,
        "1 write 1 1\n1 ok\n2 write 1 2\n2 ok\n3 read 1\n3 ok 1\n",
    ),
    (
        "a value comes and goes",
        Rule::A,
        "1 write 1 1\n2 read 1\n2 ok 1\n3 read 1\n3 ok zero\n1 ok\n",
    ),
    (
        "two values take turns",
        Rule::A,
        "1 write 1 1\n2 write 1 2\n1 ok\n2 ok\n3 read 1\n3 ok 1\n4 read 1\n4 ok 2\n5 read 1\n5 ok 1\n",
    ),
    (
        "a write is seen before it was asked for",
        Rule::A,
        "1 read 1\n1 ok 1\n2 write 1 1\n2 ok\n",
    ),
    (
        "a write that failed is seen",
        Rule::A,
        "1 write 1 1\n1 fail\n2 read 1\n2 ok 1\n",
    ),
    (
        "a new epoch loses what was completed",
        Rule::A,
        "1 write 1 1\n1 ok\nepoch\n2 read 1\n2 ok zero\n",
    ),
    (
        "a write of an older epoch lands in the next one",
        Rule::A,
        "1 write 1 1\n1 info\nepoch\n2 read 1\n2 ok zero\n3 read 1\n3 ok 1\n",
    ),
    (
        "a write of an older epoch replaces one of the next",
        Rule::A,
        "1 write 1 1\n1 info\nepoch\n2 write 1 2\n2 ok\n3 read 1\n3 ok 1\n",
    ),
    (
        "a discard is undone",
        Rule::A,
        "1 write 1 1\n1 ok\n2 discard 1\n2 ok\n3 read 1\n3 ok 1\n",
    ),
    (
        "zeros are there without a discard in between",
        Rule::A,
        "1 discard 1\n1 ok\n2 write 1 1\n2 ok\n3 read 1\n3 ok zero\n4 discard 1\n4 ok\n",
    ),
    (
        "one discard cannot be in two places",
        Rule::A,
        "1 discard 1\n2 write 1 1\n2 ok\n3 read 1\n3 ok zero\n4 read 1\n4 ok 1\n5 read 1\n5 ok zero\n1 ok\n",
    ),
    (
        "a crash takes what a flush had covered",
        Rule::B,
        "1 write 1 1\n1 ok\n2 flush\n2 ok\ncrash\n3 read 1\n3 ok zero\n",
    ),
    (
        "so does a loss of power",
        Rule::B,
        "1 write 1 1\n1 ok\n2 flush\n2 ok\npower-loss\n3 read 1\n3 ok zero\n",
    ),
    (
        "a crash brings back what the flushed write had replaced",
        Rule::B,
        "1 write 1 1\n1 ok\n2 write 1 2\n2 ok\n3 flush\n3 ok\ncrash\n4 read 1\n4 ok 1\n",
    ),
    (
        "a crash takes what FUA wrote",
        Rule::B,
        "1 fua 1 1\n1 ok\ncrash\n2 read 1\n2 ok zero\n",
    ),
    (
        "a crash leaves an order that the reads had ruled out",
        Rule::B,
        "1 write 1 1\n2 write 1 2\n3 read 1\n3 ok 1\n4 read 1\n4 ok 2\n1 ok\n2 ok\n5 flush\n5 ok\ncrash\n6 read 1\n6 ok 1\n",
    ),
    (
        "after a crash two of the old values are seen",
        Rule::B,
        "1 write 1 1\n1 ok\n2 write 1 2\n2 ok\ncrash\n3 read 1\n3 ok 2\n4 read 1\n4 ok 1\n",
    ),
    (
        "what one crash took the next one brings back",
        Rule::B,
        "1 write 1 1\n1 ok\n2 write 1 2\n2 ok\ncrash\n3 read 1\n3 ok 1\ncrash\n4 read 1\n4 ok 2\n",
    ),
    (
        "a flushed write is lost in the second crash",
        Rule::B,
        "1 write 1 1\n1 ok\ncrash\n2 write 1 2\n2 ok\n3 flush\n3 ok\ncrash\n4 read 1\n4 ok 1\n",
    ),
    (
        "a flushed discard is undone",
        Rule::B,
        "1 write 1 1\n1 ok\n2 discard 1\n2 ok\n3 flush\n3 ok\ncrash\n4 read 1\n4 ok 1\n",
    ),
    (
        "zeros from before the flushed write",
        Rule::B,
        "1 discard 1\n1 ok\n2 write 1 1\n2 ok\n3 flush\n3 ok\ncrash\n4 read 1\n4 ok zero\n",
    ),
    (
        "a crash takes what was left by the one before and seen",
        Rule::B,
        "1 write 1 1\n1 ok\ncrash\n2 read 1\n2 ok 1\ncrash\n3 read 1\n3 ok zero\n",
    ),
    ("a read fails for no reason", Rule::D, "1 read 1\n1 fail\n"),
    (
        "a read fails after the block was mended",
        Rule::D,
        "damaged 1\nmended 1\n1 read 1\n1 fail\n",
    ),
    (
        "a read fails because of another block",
        Rule::D,
        "damaged 2\n1 read 1\n1 fail\nmended 2\n",
    ),
    ("garbage", Rule::E, "1 write 1 1\n2 read 1\n2 ok garbage\n1 ok\n"),
    ("what nobody wrote", Rule::E, "1 read 1\n1 ok 7\n"),
    (
        "what somebody wrote to another block",
        Rule::E,
        "1 write 2 1\n1 ok\n2 read 1\n2 ok 1\n",
    ),
    (
        "copies with other content",
        Rule::F,
        "1 write 1 1\n1 ok\ncopy 1 1 1.1 1\ncopy 2 1 1.1 zero\n",
    ),
    (
        "copies of other versions",
        Rule::F,
        "1 write 1 1\n1 ok\ncopy 1 1 1.1 1\ncopy 2 1 1.2 1\n",
    ),
    (
        "copies that all miss a write",
        Rule::F,
        "1 write 1 1\n1 ok\ncopy 1 1 0.0 zero\ncopy 2 1 0.0 zero\n",
    ),
    (
        "copies of garbage",
        Rule::E,
        "copy 1 1 0.0 garbage\ncopy 2 1 0.0 garbage\n",
    ),
    (
        "a snapshot shows what was written later",
        Rule::G,
        "1 snapshot 1\n1 ok\n2 write 1 1\n2 ok\n3 snapshot-read 1 1\n3 ok 1\n",
    ),
    (
        "a snapshot misses what was completed before",
        Rule::G,
        "1 write 1 1\n1 ok\n2 snapshot 1\n2 ok\n3 snapshot-read 1 1\n3 ok zero\n",
    ),
    (
        "a snapshot changes",
        Rule::G,
        "1 snapshot 1\n2 write 1 1\n2 ok\n1 ok\n3 snapshot-read 1 1\n3 ok 1\n4 snapshot-read 1 1\n4 ok zero\n",
    ),
    (
        "a snapshot shows two blocks as they never were together",
        Rule::G,
        "1 snapshot 1\n2 write 1 1\n2 ok\n3 write 1 2\n3 ok\n4 write 2 3\n4 ok\n1 ok\n\
         5 snapshot-read 1 1\n5 ok 1\n6 snapshot-read 1 2\n6 ok 3\n",
    ),
    (
        "a snapshot that was never taken",
        Rule::G,
        "1 snapshot-read 1 1\n1 ok zero\n",
    ),
    ("an end without a begin", Rule::Record, "1 ok\n"),
    ("a begin in the middle", Rule::Record, "1 read 1\n1 read 1\n"),
    (
        "an id that is used twice",
        Rule::Record,
        "1 write 1 1\n1 ok\n2 write 1 1\n2 ok\n",
    ),
    ("an answer to who is gone", Rule::Record, "1 write 1 1\ncrash\n1 ok\n"),
    ("a write that saw something", Rule::Record, "1 write 1 1\n1 ok 1\n"),
];
