//! The disk that a power cut would leave, computed from the log.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::Random;
use super::recorder::{Asked, Event, Log};

/// When the power goes, and what becomes of the sectors that no flush covered by then.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// So many events of the log have happened.
    pub moment: usize,
    /// In a hundred.
    pub survive: u64,
    pub seed: u64,
}

/// The sectors of a disk that are not zeros.
pub struct Image<'a> {
    sector_bytes: u64,
    sectors: BTreeMap<u64, &'a [u8]>,
}

impl Log {
    /// The moments at which a flush was answered, from `first` on.
    pub fn marks(&self, first: usize) -> Vec<usize> {
        let marks = self.events.iter().enumerate().filter(|(moment, event)| {
            *moment >= first && matches!(event, Event::Answered(number) if matches!(self.asked[*number], Asked::Flush))
        });
        marks.map(|(moment, _)| moment).collect()
    }

    /// `count` cuts, spread evenly over the flushes from `first` on. The power goes when a flush has just been answered,
    /// when the next one is about to be, or between them.
    pub fn cuts(&self, first: usize, count: usize, seed: u64) -> Vec<Cut> {
        let marks = self.marks(first);
        assert!(
            marks.len() > count,
            "{count} marks were wanted, and the guest flushed only {} times",
            marks.len()
        );
        let mut random = Random(seed);
        let cuts = (0..count).map(|index| {
            let mark = index * (marks.len() - 1) / count;
            let (answered, next) = (marks[mark] + 1, marks[mark + 1]);
            let moment = match index % 3 {
                0 => answered,
                1 => next,
                _ => answered + random.below((next - answered + 1) as u64) as usize,
            };
            Cut {
                moment,
                survive: [0, 50, 90, 10][random.below(4) as usize],
                seed: random.next(),
            }
        });
        cuts.collect()
    }

    /// What a power cut leaves: all that a flush or FUA covered, and of the rest each sector by chance.
    pub fn image(&self, cut: &Cut, sector_bytes: u32) -> Image<'_> {
        let events = &self.events[..cut.moment];
        let mut asked_at = vec![None; self.asked.len()];
        let mut answered_at = vec![None; self.asked.len()];
        for (moment, event) in events.iter().enumerate() {
            match event {
                Event::Asked(number) => asked_at[*number] = Some(moment),
                Event::Answered(number) => answered_at[*number] = Some(moment),
            }
        }
        let flushes = (0..self.asked.len()).filter(|&number| matches!(self.asked[number], Asked::Flush));
        // A flush covers what was answered before it was asked for.
        let flushed = flushes
            .filter(|&number| answered_at[number].is_some())
            .filter_map(|number| asked_at[number])
            .max();
        let mut random = Random(cut.seed);
        let mut image = Image {
            sector_bytes: u64::from(sector_bytes),
            sectors: BTreeMap::new(),
        };
        for (number, asked) in self.asked.iter().enumerate() {
            if asked_at[number].is_none() {
                break;
            }
            let fua = matches!(asked, Asked::Write { fua: true, .. } | Asked::Zero { fua: true, .. });
            let durable =
                answered_at[number].is_some_and(|answered| fua || flushed.is_some_and(|asked| answered < asked));
            let mut survives = || durable || random.below(100) < cut.survive;
            match asked {
                Asked::Write { offset, data, .. } => {
                    for (sector, bytes) in (image.sector(*offset)..).zip(data.chunks(sector_bytes as usize)) {
                        if survives() {
                            image.put(sector, bytes);
                        }
                    }
                }
                Asked::Zero { offset, len, .. } if durable => image.zero(*offset, *len),
                Asked::Zero { offset, len, .. } => {
                    // By parts: a discard of a whole device has many sectors.
                    let part = (len / 8).next_multiple_of(image.sector_bytes).max(image.sector_bytes);
                    for at in (*offset..offset + len).step_by(part as usize) {
                        if survives() {
                            image.zero(at, part.min(offset + len - at));
                        }
                    }
                }
                Asked::Flush => {}
            }
        }
        image
    }

    /// What the disk holds in the end.
    pub fn end(&self, sector_bytes: u32) -> Image<'_> {
        let cut = Cut {
            moment: self.events.len(),
            survive: 100,
            seed: 0,
        };
        self.image(&cut, sector_bytes)
    }
}

impl<'a> Image<'a> {
    /// The number of the sector at `offset`; a guest knows no smaller unit.
    fn sector(&self, offset: u64) -> u64 {
        assert!(
            offset.is_multiple_of(self.sector_bytes),
            "offset {offset} is inside a sector"
        );
        offset / self.sector_bytes
    }

    fn put(&mut self, sector: u64, bytes: &'a [u8]) {
        assert_eq!(bytes.len() as u64, self.sector_bytes, "a write ends inside a sector");
        if bytes.iter().all(|byte| *byte == 0) {
            self.sectors.remove(&sector);
        } else {
            self.sectors.insert(sector, bytes);
        }
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let sectors = self.sector(offset)..self.sector(offset + len);
        let inside: Vec<u64> = self.sectors.range(sectors).map(|(sector, _)| *sector).collect();
        for sector in inside {
            self.sectors.remove(&sector);
        }
    }

    /// Makes a sparse file of it.
    pub fn write_to(&self, path: &Path, size_bytes: u64) {
        let file = File::create(path).expect("make the file of an image");
        file.set_len(size_bytes).expect("give the image its size");
        let mut run: (u64, Vec<u8>) = (0, Vec::new());
        for (sector, bytes) in &self.sectors {
            let at = sector * self.sector_bytes;
            if run.0 + run.1.len() as u64 != at {
                file.write_all_at(&run.1, run.0).expect("write the image");
                run = (at, Vec::new());
            }
            run.1.extend_from_slice(bytes);
        }
        file.write_all_at(&run.1, run.0).expect("write the image");
    }

    /// Fails unless `file` holds the same.
    pub fn assert_is(&self, file: &File, size_bytes: u64) {
        const PART: usize = 1 << 20;
        let mut found = vec![0; PART];
        for start in (0..size_bytes).step_by(PART) {
            let len = PART.min((size_bytes - start) as usize);
            file.read_exact_at(&mut found[..len], start).expect("read the device");
            let sectors = found[..len].chunks(self.sector_bytes as usize);
            for (sector, found) in (self.sector(start)..).zip(sectors) {
                let same = match self.sectors.get(&sector) {
                    Some(bytes) => found == *bytes,
                    None => found.iter().all(|byte| *byte == 0),
                };
                assert!(same, "sector {sector} is not what the log says was written");
            }
        }
    }
}
