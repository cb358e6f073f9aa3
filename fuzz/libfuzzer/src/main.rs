//! libFuzzer's loop around the target that `FUZZ_TARGET` names.

#![no_main]

use std::sync::OnceLock;

use galleonfs_fuzz::Target;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static TARGET: OnceLock<&'static Target> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("FUZZ_TARGET").expect("FUZZ_TARGET names a target");
        galleonfs_fuzz::target(&name).expect("FUZZ_TARGET is one of those in fuzz/corpus")
    });
    (target.run)(data);
});
