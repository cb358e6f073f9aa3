//! Sizes: what a volume may measure, and what a pool must set aside for it.

pub const KIB: i64 = 1 << 10;
pub const MIB: i64 = 1 << 20;
pub const GIB: i64 = 1 << 30;
pub const TIB: i64 = 1 << 40;

/// Volumes are sized in multiples of this.
pub const VOLUME_STEP_BYTES: i64 = MIB;
/// The size of a volume for which no size was asked.
pub const VOLUME_DEFAULT_BYTES: i64 = GIB;
/// Smaller requests are rounded up to this: below it no file system of ours can be made.
pub const VOLUME_MIN_BYTES: i64 = 16 * MIB;
/// Larger requests are refused.
pub const VOLUME_MAX_BYTES: i64 = 16 * TIB;

/// What a log needs beside the data: records' headers and checksums, the map, and a quarter of the size for the cleaner to
/// win space in: with less, overwriting at random would write several times as much. The engine counts on the same
/// (`promised_bytes` of its store).
const OVERHEAD_FIXED_BYTES: i64 = 80 * MIB;
const OVERHEAD_DIVISOR: i64 = 4;

const _: () = assert!(VOLUME_MIN_BYTES % VOLUME_STEP_BYTES == 0 && VOLUME_MAX_BYTES % VOLUME_STEP_BYTES == 0);
const _: () = assert!(VOLUME_STEP_BYTES % crate::volume::BLOCK_SIZE_DEFAULT as i64 == 0);

/// Rounds up to the next size a volume can have. `None` when that is beyond [`VOLUME_MAX_BYTES`].
pub fn round_up(bytes: i64) -> Option<i64> {
    if bytes > VOLUME_MAX_BYTES {
        return None;
    }
    let stepped = (bytes.max(0) + VOLUME_STEP_BYTES - 1) / VOLUME_STEP_BYTES * VOLUME_STEP_BYTES;
    Some(stepped.max(VOLUME_MIN_BYTES))
}

/// What placement sets aside in a pool for one replica of a volume of this size.
pub fn reserved_bytes(size_bytes: i64) -> i64 {
    size_bytes
        .saturating_add(size_bytes / OVERHEAD_DIVISOR)
        .saturating_add(OVERHEAD_FIXED_BYTES)
}

/// The largest volume for which `free_bytes` suffice; 0 if there is none. The inverse of [`reserved_bytes`].
pub fn largest_volume(free_bytes: i64) -> i64 {
    let bare = free_bytes.saturating_sub(OVERHEAD_FIXED_BYTES).max(0);
    // size + size/4 <= bare  <=  size <= bare - bare/5 (rounded towards less)
    let size = (bare - bare / (OVERHEAD_DIVISOR + 1) - 1).max(0);
    let size = (size / VOLUME_STEP_BYTES * VOLUME_STEP_BYTES).min(VOLUME_MAX_BYTES);
    if size < VOLUME_MIN_BYTES { 0 } else { size }
}

/// Bytes for a person: the exact figure only where no unit fits.
pub fn human(bytes: i64) -> String {
    for (unit, name) in [(TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")] {
        if bytes.abs() >= unit {
            let tenths = bytes as i128 * 10 / unit as i128;
            return match tenths % 10 {
                0 => format!("{} {name}", tenths / 10),
                tenth => format!("{}.{} {name}", tenths / 10, tenth.abs()),
            };
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_to_whole_mebibytes() {
        assert_eq!(round_up(GIB), Some(GIB));
        assert_eq!(round_up(GIB + 1), Some(GIB + MIB));
        assert_eq!(round_up(1), Some(VOLUME_MIN_BYTES));
        assert_eq!(round_up(VOLUME_MAX_BYTES), Some(VOLUME_MAX_BYTES));
        assert_eq!(round_up(VOLUME_MAX_BYTES + 1), None);
        assert_eq!(round_up(i64::MAX), None);
    }

    #[test]
    fn the_largest_volume_of_a_pool_fits_into_it() {
        for free in [
            0,
            MIB,
            48 * MIB,
            49 * MIB,
            50 * MIB,
            GIB - 1,
            GIB,
            10 * GIB + 12345,
            3 * TIB,
            40 * TIB,
            i64::MAX,
        ] {
            let size = largest_volume(free);
            assert!(
                size == 0 || reserved_bytes(size) <= free,
                "{size} needs more than {free}"
            );
            assert!(
                size == 0 || round_up(size) == Some(size),
                "{size} is no size of a volume"
            );
        }
    }

    #[test]
    fn the_largest_volume_leaves_less_than_two_steps_unused() {
        for free in [110 * MIB, GIB, 10 * GIB + 12345, 3 * TIB] {
            let next = largest_volume(free) + 2 * VOLUME_STEP_BYTES;
            assert!(reserved_bytes(next) > free, "{next} would have fitted into {free}");
        }
    }

    #[test]
    fn figures_are_readable() {
        assert_eq!(human(0), "0 bytes");
        assert_eq!(human(GIB), "1 GiB");
        assert_eq!(human(GIB + 600 * MIB), "1.5 GiB");
        assert_eq!(human(1536), "1.5 KiB");
        assert_eq!(human(-5 * MIB), "-5 MiB");
    }
}
