//! The definitions of the custom resources as the chart wants them: YAML, one file each, always the same bytes for the
//! same types, so that a test can hold chart and code together.

use std::{fs, io::Write, path::Path};

use anyhow::{Context, Result};

/// Each definition's file name and text, in the order of [`galleonfs_api::crds`].
pub fn crd_yaml() -> Result<Vec<(String, String)>> {
    galleonfs_api::crds()
        .into_iter()
        .map(|crd| {
            let name = crd_file_name(&crd.spec.names.plural);
            let text = serde_yaml::to_string(&crd).with_context(|| format!("writing {name} as YAML"))?;
            Ok((name, text))
        })
        .collect()
}

/// The file of a resource in the chart's `files/crds/`.
pub fn crd_file_name(plural: &str) -> String {
    format!("{plural}.yaml")
}

pub(crate) fn print(to: &mut impl Write) -> Result<()> {
    for (_, text) in crd_yaml()? {
        write!(to, "---\n{text}").context("printing the definitions")?;
    }
    Ok(())
}

pub(crate) fn write_files(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("making the directory {}", directory.display()))?;
    for (name, text) in crd_yaml()? {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}
