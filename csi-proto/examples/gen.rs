//! Writes `src/generated` anew from `proto`. Everything runs in this process: protox reads the files, prost and tonic
//! write the code. No protoc.

use std::{error::Error, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let home = Path::new(env!("CARGO_MANIFEST_DIR"));
    generate(home, &home.join("src/generated"))
}

/// Compiles the protocols below `home` into `out_dir`. The test that compares calls it too.
pub fn generate(home: &Path, out_dir: &Path) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(out_dir)?;
    let files = protox::compile(["csi.proto", "pluginregistration.proto"], [home.join("proto")])?;
    tonic_prost_build::configure()
        .out_dir(out_dir)
        .btree_map(".")
        .generate_default_stubs(true)
        .emit_rerun_if_changed(false)
        .compile_fds(files)?;
    Ok(())
}
