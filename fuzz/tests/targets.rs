//! Every target on its corpus, and on inputs made of it by chance. Input number `n` is the same on every machine.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use galleonfs_fuzz::{Target, mutated, target};

/// What one input may make us take beyond what was taken before: a replica has segments of a megabyte, some of which are
/// copied, and the largest request of a guest has one.
const TAKEN_BYTES_MAX: isize = 64 << 20;

/// Counts what this thread has taken and not given back.
struct Counting;

thread_local! {
    static TAKEN: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(bytes: isize) {
    // A thread that ends has no counter any more.
    let _ = TAKEN.try_with(|taken| {
        let (now, most) = taken.get();
        taken.set((now + bytes, most.max(now + bytes)));
    });
}

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size as isize - layout.size() as isize);
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(at, layout, new_size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn number(knob: &str) -> Option<u64> {
    let text = std::env::var(knob).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{knob} is a number, not {text}")),
    )
}

/// The kept inputs in the order of their names.
fn corpus(target: &Target) -> Vec<(String, Vec<u8>)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let mut kept: Vec<(String, Vec<u8>)> = fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| {
            let path = entry.expect("list the corpus").path();
            let name = path
                .file_name()
                .expect("a file has a name")
                .to_string_lossy()
                .into_owned();
            (name, fs::read(&path).expect("read an input"))
        })
        .collect();
    kept.sort();
    kept
}

fn try_one(target: &Target, what: &str, input: &[u8]) {
    let before = TAKEN.get().0;
    TAKEN.set((before, before));
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let taken = TAKEN.get().1 - before;
    if outcome.is_ok() && taken <= TAKEN_BYTES_MAX {
        return;
    }
    let file = std::env::temp_dir().join(format!("galleonfs-fuzz-{}", target.name));
    fs::write(&file, input).expect("keep the input");
    panic!(
        "{what} of target {} fails ({taken} bytes of memory); it is in {}. When it is mended, the input moves to \
         fuzz/corpus/{}/",
        target.name,
        file.display(),
        target.name
    );
}

fn drive(name: &str) {
    let target = target(name).expect("there is such a target");
    let kept = corpus(target);
    assert!(!kept.is_empty(), "{name} has a corpus");
    for (file, input) in &kept {
        try_one(target, file, input);
    }
    let inputs: Vec<Vec<u8>> = kept.into_iter().map(|(_, input)| input).collect();
    let (first, runs) = (number("FIRST").unwrap_or(1), number("RUNS").unwrap_or(target.runs));
    for seed in first..first + runs {
        let replay = format!("RUNS=1 FIRST={seed} cargo test -p galleonfs-fuzz --test targets {name}: the input");
        try_one(target, &replay, &mutated(seed, &inputs, target.bytes_max));
    }
}

macro_rules! targets {
    ($($test:ident: $name:literal,)*) => {
        $(
            #[test]
            fn $test() {
                drive($name);
            }
        )*

        #[test]
        fn every_target_is_driven() {
            let driven = [$($name),*];
            let all: Vec<&str> = galleonfs_fuzz::TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(driven.to_vec(), all);
        }
    };
}

targets! {
    no_superblocks_make_us_panic: "superblocks",
    no_segment_header_makes_us_panic: "segment_header",
    no_record_header_makes_us_panic: "record_header",
    no_page_makes_us_panic: "page",
    no_row_of_a_list_makes_us_panic: "rows",
    no_row_of_salts_makes_us_panic: "key_row",
    no_location_makes_us_panic: "location",
    no_compressed_block_makes_us_panic_or_write_elsewhere: "compressed_block",
    no_changed_block_opens: "sealed_block",
    no_replica_makes_us_panic_or_return_what_was_never_written: "replica",
    no_message_of_replication_makes_us_panic_or_is_taken_for_another: "replication_message",
    no_request_of_the_kernel_makes_us_panic_or_answer_twice: "fuse_request",
    no_label_of_a_pool_makes_us_panic: "pool_label",
    no_parameters_of_a_class_make_us_panic: "class_parameters",
    no_frame_of_another_node_makes_us_panic_or_is_let_through_changed: "wire_frame",
}

/// Writes the first inputs anew: those that the engine itself makes. Only when the format has changed.
#[test]
#[ignore = "writes into the repository"]
fn write_the_seeds_of_the_corpus() {
    for (target, name, bytes) in galleonfs_fuzz::seeds() {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        fs::create_dir_all(&dir).expect("make the folder of a corpus");
        fs::write(dir.join(name), bytes).expect("write an input");
    }
}
