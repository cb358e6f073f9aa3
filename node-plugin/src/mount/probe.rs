//! What is on a device, and whether it may be formatted.
//!
//! Formatting is the one step that destroys data without a trace, so the rule is strict: a device is formatted only when
//! `blkid` recognises nothing on it *and* its first and last MiB read as zeros. A new volume reads as zeros everywhere;
//! anything else on it was written by somebody.

use std::path::Path;
use std::time::Duration;

use super::{FsType, MountError, Tools};

/// Probing reads a few hundred KiB; a volume that needs longer does not answer.
const PROBE_DEADLINE: Duration = Duration::from_secs(60);

const MIB: u64 = 1 << 20;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Proven blank.
    Blank,
    /// A file system that we mount.
    Known(FsType),
    /// Anything else, described for a person.
    Foreign(String),
}

/// Looks at the device. Never writes.
pub async fn probe(tools: &Tools, device: &Path, size_bytes: u64) -> Result<Content, MountError> {
    let args = [
        "-p", "-o", "export", "-s", "TYPE", "-s", "PTTYPE", "-s", "USAGE", "-s", "VERSION",
    ];
    let args = args.iter().map(|arg| arg.as_ref()).chain([device.as_os_str()]);
    let found = tools.run("blkid", args, PROBE_DEADLINE).await?;
    match found.code {
        0 => Ok(parse_export(&String::from_utf8_lossy(&found.stdout))),
        2 if is_zero(tools, device, size_bytes).await? => Ok(Content::Blank),
        2 => Ok(Content::Foreign(
            "data that no known format explains (its first or last MiB is not zero)".into(),
        )),
        8 => Ok(Content::Foreign("signatures of several formats at once".into())),
        _ => Err(found.failure()),
    }
}

/// `NAME=value` lines. A partition table beside a file system makes the whole thing foreign.
fn parse_export(text: &str) -> Content {
    let value = |name: &str| {
        text.lines()
            .filter_map(|line| line.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    };
    match (value("TYPE"), value("PTTYPE")) {
        (Some(name), None) => match name.parse() {
            Ok(fs) => Content::Known(fs),
            Err(_) => Content::Foreign(format!("a file system or volume of type {name}")),
        },
        (_, Some(table)) => Content::Foreign(format!("a partition table of type {table}")),
        (None, None) => Content::Foreign("a signature that blkid does not name".into()),
    }
}

async fn is_zero(tools: &Tools, device: &Path, size_bytes: u64) -> Result<bool, MountError> {
    let span = size_bytes.min(MIB);
    for offset in [0, size_bytes - span] {
        let (span, offset) = (span.to_string(), offset.to_string());
        // Only the device is skipped into; the zeros start at their beginning.
        let args = ["-s", "-n", &span, "-i", &format!("{offset}:0")].map(str::to_owned);
        let args = args
            .into_iter()
            .map(Into::into)
            .chain([device.as_os_str().to_owned(), "/dev/zero".into()]);
        let compared = tools.run("cmp", args, PROBE_DEADLINE).await?;
        match compared.code {
            0 => {}
            1 => return Ok(false),
            _ => return Err(compared.failure()),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lone_file_system_of_ours_is_known() {
        assert_eq!(
            parse_export("DEVNAME=/dev/loop0\nTYPE=ext4\nUSAGE=filesystem\n"),
            Content::Known(FsType::Ext4)
        );
        assert_eq!(parse_export("TYPE=xfs\n"), Content::Known(FsType::Xfs));
        assert!(matches!(parse_export("TYPE=ext3\n"), Content::Foreign(text) if text.contains("ext3")));
        assert!(matches!(parse_export("TYPE=ext4\nPTTYPE=dos\n"), Content::Foreign(text) if text.contains("dos")));
        assert!(matches!(parse_export("PTTYPE=gpt\n"), Content::Foreign(text) if text.contains("gpt")));
        assert!(matches!(parse_export(""), Content::Foreign(_)));
    }

    #[tokio::test]
    async fn files_stand_in_for_devices_and_only_zeros_are_blank() {
        let dir = crate::testing::temp_dir("probe");
        let tools = super::super::HungChildren::default().tools("v");
        let path = dir.path().join("device");
        let size = 8 * MIB;
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(size).unwrap();
        assert_eq!(probe(&tools, &path, size).await.unwrap(), Content::Blank);

        use std::os::unix::fs::FileExt;
        for offset in [0, MIB - 1, size - MIB, size - 1] {
            file.write_all_at(&[1], offset).unwrap();
            let found = probe(&tools, &path, size).await.unwrap();
            assert!(
                matches!(&found, Content::Foreign(text) if text.contains("no known format")),
                "{offset}: {found:?}"
            );
            file.write_all_at(&[0], offset).unwrap();
        }
        // A partition table, and a swap area: signatures that are no file systems.
        file.write_all_at(&[0x55, 0xaa], 510).unwrap();
        file.write_all_at(&[0x80, 0, 2, 0, 0x83, 0, 9, 0, 8, 0, 0, 0, 8, 0, 0, 0], 446)
            .unwrap();
        assert!(matches!(probe(&tools, &path, size).await.unwrap(), Content::Foreign(_)));
        file.write_all_at(&[0; 512], 0).unwrap();
        std::process::Command::new("mkswap").arg(&path).output().unwrap();
        assert!(matches!(probe(&tools, &path, size).await.unwrap(), Content::Foreign(text) if text.contains("swap")));
    }
}
