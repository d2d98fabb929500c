//! Just enough of ZIP for NumPy's archives: entries that are stored or deflated, zip64, no
//! encryption, nothing spread over several disks. Names are keys, never paths: nothing is unpacked.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::path::Path;

use crate::input::InputFile;
use crate::{Error, Result};

const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const END_64_LOCATOR: u32 = 0x0706_4b50;
const DIRECTORY_ENTRY: u32 = 0x0201_4b50;
const LOCAL_HEADER: u32 = 0x0403_4b50;

const STORED: u16 = 0;
const DEFLATED: u16 = 8;

/// NumPy's level.
const LEVEL: u8 = 6;

/// Deflate cannot make more of a byte: 258 bytes from two bits.
const MAX_RATIO: u64 = 1032;

/// An open archive. Only its directory is in memory.
#[derive(Debug)]
pub(crate) struct Archive {
    file: InputFile,
    /// In the order of the directory.
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    deflated: bool,
    crc: u32,
    /// Bytes in the file, and bytes of content.
    packed: u64,
    size: u64,
    /// Where the entry's own header is.
    header: u64,
}

/// Fields of a piece of the file, from front to back. Reads past its end give an error.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (head, rest) = self.0.split_at_checked(n).ok_or("a header of the archive is cut short")?;
        self.0 = rest;
        Ok(head)
    }

    fn u16(&mut self) -> Result<u16, String> {
        Ok(u16::from_le_bytes(self.bytes(2)?.try_into().expect("2 bytes")))
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.bytes(4)?.try_into().expect("4 bytes")))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.bytes(8)?.try_into().expect("8 bytes")))
    }
}

impl Archive {
    /// Opens an archive and checks its directory.
    pub fn open(path: &Path) -> Result<Archive> {
        let file = InputFile::open(path)?;
        let bad = |what: String| Error::bad_data(path, what);
        let directory = Directory::find(&file)?;
        // Inside the file, as `find` has checked.
        let bytes = file.read_vec(directory.start, directory.len as usize)?;
        let entries = parse_directory(&bytes, &directory).map_err(bad)?;
        let by_name = entries.iter().map(|e| e.name.clone()).zip(0..).collect();
        Ok(Archive { file, entries, by_name })
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The names of all entries, in the order of the directory.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|e| e.name.as_str())
    }

    /// The content of the entry called `name`, checked against its checksum.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let bad = |what: String| Error::bad_data(self.path(), format!("{name:?}: {what}"));
        let Some(&place) = self.by_name.get(name) else {
            return Err(Error::missing(self.path(), format!("has no entry {name:?}")));
        };
        let entry = &self.entries[place];
        // The entry's own header repeats the directory; of it only the lengths of two fields
        // matter, which say where the data begins.
        let header = self.file.read_vec(entry.header, 30)?;
        let start = data_start(&header, entry).map_err(bad)?;
        let packed = self.file.read_vec(start, entry.packed as usize)?;
        let content = if entry.deflated {
            let size = entry.size as usize;
            miniz_oxide::inflate::decompress_to_vec_with_limit(&packed, size)
                .map_err(|e| bad(format!("cannot be inflated: {:?}", e.status)))?
        } else {
            packed
        };
        if content.len() as u64 != entry.size {
            return Err(bad(format!("has {} bytes, the directory says {}", content.len(), entry.size)));
        }
        if crc32fast::hash(&content) != entry.crc {
            return Err(bad("has another checksum than the directory says; the file is damaged".to_owned()));
        }
        Ok(content)
    }
}

/// Where an entry's data begin. The header's end and the data lie before the directory, because
/// `parse_directory` has left room for a header and the packed bytes; the two fields in between
/// may be of any length, so a read may still run into the end of the file, which is an error.
fn data_start(header: &[u8], entry: &Entry) -> Result<u64, String> {
    let mut fields = Fields(header);
    if fields.u32()? != LOCAL_HEADER {
        return Err("has no header where the directory says".to_owned());
    }
    fields.bytes(22)?;
    let (name, extra) = (fields.u16()?, fields.u16()?);
    Ok(entry.header + 30 + u64::from(name) + u64::from(extra))
}

/// Where the directory is.
struct Directory {
    start: u64,
    len: u64,
    entries: u64,
}

impl Directory {
    fn find(file: &InputFile) -> Result<Directory> {
        let bad = |what: String| Error::bad_data(file.path(), what);
        // The end record is 22 bytes and a comment of up to 65535.
        let tail_len = file.len().min(22 + 0xffff);
        let tail_start = file.len() - tail_len;
        let tail = file.read_vec(tail_start, tail_len as usize)?;
        let end = (0..tail.len().saturating_sub(21))
            .rev()
            .find(|&i| {
                // The comment must reach to the end, or a comment could pose as the record.
                let comment = u16::from_le_bytes([tail[i + 20], tail[i + 21]]) as usize;
                tail[i..i + 4] == END.to_le_bytes() && i + 22 + comment == tail.len()
            })
            .ok_or_else(|| bad("is no ZIP archive, or has been cut short".to_owned()))?;
        let mut fields = Fields(&tail[end + 4..]);
        let parse = |fields: &mut Fields| {
            let disks = (fields.u16()?, fields.u16()?);
            let entries = (fields.u16()?, fields.u16()?);
            Ok::<_, String>((disks, entries, fields.u32()?, fields.u32()?))
        };
        let (disks, entries, len, start) = parse(&mut fields).map_err(bad)?;
        let end = tail_start + end as u64;
        let wants_64 = entries.0 == u16::MAX || len == u32::MAX || start == u32::MAX;
        let (directory, limit) = if wants_64 {
            Directory::find_64(file, end)?
        } else if disks != (0, 0) || entries.0 != entries.1 {
            return Err(bad("is spread over several disks".to_owned()));
        } else {
            (Directory { start: start.into(), len: len.into(), entries: entries.0.into() }, end)
        };
        if directory.start.checked_add(directory.len).is_none_or(|end| end > limit) {
            return Err(bad("has a directory that leaves the file".to_owned()));
        }
        Ok(directory)
    }

    /// The directory of an archive whose end record, at `end`, refers to the larger one. Also says
    /// where that begins.
    fn find_64(file: &InputFile, end: u64) -> Result<(Directory, u64)> {
        let bad = |what: String| Error::bad_data(file.path(), what);
        let broken = || bad("has a broken zip64 end record".to_owned());
        let locator = file.read_vec(end.checked_sub(20).ok_or_else(broken)?, 20)?;
        let mut fields = Fields(&locator);
        let parse = |fields: &mut Fields| Ok::<_, String>((fields.u32()?, fields.u32()?, fields.u64()?));
        let (signature, _, at) = parse(&mut fields).map_err(bad)?;
        if signature != END_64_LOCATOR || at.checked_add(56 + 20).is_none_or(|stop| stop > end) {
            return Err(broken());
        }
        let record = file.read_vec(at, 56)?;
        let mut fields = Fields(&record);
        let parse = |fields: &mut Fields| {
            let signature = fields.u32()?;
            fields.bytes(20)?;
            Ok::<_, String>((signature, fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?))
        };
        let (signature, here, entries, len, start) = parse(&mut fields).map_err(bad)?;
        if signature != END_64 || here != entries {
            return Err(broken());
        }
        Ok((Directory { start, len, entries }, at))
    }
}

fn parse_directory(bytes: &[u8], directory: &Directory) -> Result<Vec<Entry>, String> {
    if directory.entries > bytes.len() as u64 / 46 {
        return Err(format!("{} entries do not fit in its directory", directory.entries));
    }
    let mut fields = Fields(bytes);
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..directory.entries {
        let entry = parse_entry(&mut fields)?;
        let Entry { name, packed, size, header, deflated, .. } = &entry;
        if !names.insert(name.clone()) {
            return Err(format!("{name:?} occurs twice"));
        }
        if header.checked_add(30).and_then(|n| n.checked_add(*packed)).is_none_or(|end| end > directory.start)
        {
            return Err(format!("{name:?} leaves the file"));
        }
        let most = if *deflated { packed.saturating_mul(MAX_RATIO) } else { *packed };
        if *size > most || (!deflated && size != packed) || usize::try_from(*size).is_err() {
            return Err(format!("{name:?}: {packed} packed bytes cannot hold {size}"));
        }
        entries.push(entry);
    }
    // Entries that share bytes are how a small archive makes a huge content.
    let mut places: Vec<(u64, u64, &str)> =
        entries.iter().map(|e| (e.header, e.header + 30 + e.packed, e.name.as_str())).collect();
    places.sort_unstable();
    for pair in places.windows(2) {
        if pair[1].0 < pair[0].1 {
            return Err(format!("{:?} and {:?} overlap", pair[0].2, pair[1].2));
        }
    }
    Ok(entries)
}

fn parse_entry(fields: &mut Fields) -> Result<Entry, String> {
    if fields.u32()? != DIRECTORY_ENTRY {
        return Err("its directory is broken".to_owned());
    }
    fields.bytes(4)?; // Versions.
    let flags = fields.u16()?;
    let method = fields.u16()?;
    fields.bytes(4)?; // Time and date.
    let crc = fields.u32()?;
    let (mut packed, mut size) = (u64::from(fields.u32()?), u64::from(fields.u32()?));
    let (name, extra, comment) = (fields.u16()?, fields.u16()?, fields.u16()?);
    fields.bytes(8)?; // Disk and attributes.
    let mut header = u64::from(fields.u32()?);
    let name = String::from_utf8_lossy(fields.bytes(name.into())?).into_owned();
    let mut extra = Fields(fields.bytes(extra.into())?);
    fields.bytes(comment.into())?;

    // Sizes that do not fit in 32 bits are in the extra field of number 1, in this order.
    while extra.0.len() >= 4 {
        let (number, len) = (extra.u16()?, extra.u16()?);
        let mut field = Fields(extra.bytes(len.into())?);
        if number == 1 {
            for value in [&mut size, &mut packed, &mut header] {
                if *value == u64::from(u32::MAX) {
                    *value = field.u64()?;
                }
            }
        }
    }
    if flags & 1 != 0 {
        return Err(format!("{name:?} is encrypted"));
    }
    if method != STORED && method != DEFLATED {
        return Err(format!("{name:?} is packed with method {method}; known are stored and deflated"));
    }
    Ok(Entry { name, deflated: method == DEFLATED, crc, packed, size, header })
}

/// Writes entries, one after the other, then the directory.
pub(crate) struct ArchiveWriter<W> {
    out: W,
    at: u64,
    directory: Vec<u8>,
    names: HashSet<String>,
}

impl<W: Write> ArchiveWriter<W> {
    pub fn new(out: W) -> Self {
        ArchiveWriter { out, at: 0, directory: Vec::new(), names: HashSet::new() }
    }

    /// Adds an entry made of these pieces, stored or deflated. Equal names and names past 65535
    /// bytes are errors.
    pub fn add(&mut self, name: &str, pieces: &[&[u8]], deflate: bool) -> io::Result<()> {
        let name_len = u16::try_from(name.len()).map_err(|_| io::Error::other("a name is too long"))?;
        if !self.names.insert(name.to_owned()) {
            return Err(io::Error::other(format!("{name:?} is given twice")));
        }
        let size: u64 = pieces.iter().map(|p| p.len() as u64).sum();
        let mut crc = crc32fast::Hasher::new();
        pieces.iter().for_each(|piece| crc.update(piece));
        let crc = crc.finalize();
        let deflated = deflate.then(|| miniz_oxide::deflate::compress_to_vec(&pieces.concat(), LEVEL));
        let (method, packed) = match &deflated {
            Some(bytes) => (DEFLATED, bytes.len() as u64),
            None => (STORED, size),
        };

        // What both headers share: version 4.5, UTF-8 name, how it is packed, 1980-01-01, checksum, sizes in
        // the extra field (always, so that there is one way), lengths of name and extra field.
        let mut shared = Vec::new();
        for v in [45u16, 0x0800, method, 0, 0x21] {
            shared.extend_from_slice(&v.to_le_bytes());
        }
        for v in [crc, u32::MAX, u32::MAX] {
            shared.extend_from_slice(&v.to_le_bytes());
        }
        shared.extend_from_slice(&name_len.to_le_bytes());

        let extra = |values: &[u64]| {
            let mut extra = 1u16.to_le_bytes().to_vec();
            extra.extend_from_slice(&(8 * values.len() as u16).to_le_bytes());
            values.iter().for_each(|v| extra.extend_from_slice(&v.to_le_bytes()));
            extra
        };
        let local = extra(&[size, packed]);
        let header = [
            &LOCAL_HEADER.to_le_bytes()[..],
            &shared[..],
            &(local.len() as u16).to_le_bytes(),
            name.as_bytes(),
            &local,
        ]
        .concat();
        let central = extra(&[size, packed, self.at]);
        let entry = [
            &DIRECTORY_ENTRY.to_le_bytes()[..],
            &45u16.to_le_bytes(),
            &shared[..],
            &(central.len() as u16).to_le_bytes(),
            &[0; 2 + 2 + 2 + 4], // No comment, disk 0, no attributes.
            &u32::MAX.to_le_bytes(),
            name.as_bytes(),
            &central,
        ]
        .concat();
        self.directory.extend_from_slice(&entry);
        self.out.write_all(&header)?;
        match &deflated {
            Some(bytes) => self.out.write_all(bytes)?,
            None => pieces.iter().try_for_each(|piece| self.out.write_all(piece))?,
        }
        self.at += header.len() as u64 + packed;
        Ok(())
    }

    /// Writes the directory. Returns what was given to `new`.
    pub fn finish(mut self) -> io::Result<W> {
        let (entries, len) = (self.names.len() as u64, self.directory.len() as u64);
        self.out.write_all(&self.directory)?;
        let mut end = Vec::new();
        end.extend_from_slice(&END_64.to_le_bytes());
        end.extend_from_slice(&44u64.to_le_bytes());
        end.extend_from_slice(&[45, 0, 45, 0]);
        end.extend_from_slice(&[0; 8]);
        for v in [entries, entries, len, self.at] {
            end.extend_from_slice(&v.to_le_bytes());
        }
        end.extend_from_slice(&END_64_LOCATOR.to_le_bytes());
        end.extend_from_slice(&0u32.to_le_bytes());
        end.extend_from_slice(&(self.at + len).to_le_bytes());
        end.extend_from_slice(&1u32.to_le_bytes());
        end.extend_from_slice(&END.to_le_bytes());
        end.extend_from_slice(&[0; 4]);
        end.extend_from_slice(&[0xff; 2 + 2 + 4 + 4]);
        end.extend_from_slice(&[0; 2]);
        self.out.write_all(&end)?;
        Ok(self.out)
    }
}
