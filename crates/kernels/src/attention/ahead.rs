//! What a chunk of few rows will read, asked for some way ahead.

use crate::layout::prefetch_line;

/// Runs of bytes at one distance from each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Runs {
    pub start: *const u8,
    pub bytes: usize,
    pub stride: usize,
    pub count: usize,
}

impl Runs {
    pub const NONE: Runs = Runs { start: std::ptr::null(), bytes: 0, stride: 0, count: 0 };
}

/// Bytes between what is read and what is asked for.
const AHEAD: usize = 16 * 1024;
const LINE: usize = 64;

/// Goes through the lines of a chunk and of the next one, from some way behind the beginning.
///
/// The parts of a block that few keys fill lie apart; asking for what follows in memory would fetch lines that
/// nobody reads.
pub(crate) struct Ahead {
    /// What comes after the run, in order.
    parts: [Runs; 4],
    part: usize,
    /// The run.
    line: *const u8,
    left: usize,
    far: bool,
}

impl Ahead {
    /// Asks for nothing.
    pub fn none() -> Ahead {
        Ahead { parts: [Runs::NONE; 4], part: 4, line: std::ptr::null(), left: 0, far: false }
    }

    /// Whether what is read comes from memory.
    pub fn is_far(&self) -> bool {
        self.far
    }

    /// Through the keys and values of this chunk and of the next, whose first lines the last chunk asked for.
    pub fn new(this: [Runs; 2], next: [Runs; 2]) -> Ahead {
        let mut ahead =
            Ahead { parts: [this[0], this[1], next[0], next[1]], part: 0, far: true, ..Ahead::none() };
        let mut skip = AHEAD / LINE;
        while skip > 0 && (ahead.left > 0 || ahead.next_run()) {
            let lines = skip.min(ahead.left);
            ahead.line = ahead.line.wrapping_add(lines * LINE);
            ahead.left -= lines;
            skip -= lines;
        }
        ahead
    }

    /// Asks for the next line, if there is one.
    #[inline(always)]
    pub fn ask(&mut self) {
        if self.left > 0 || self.next_run() {
            prefetch_line::<false>(self.line);
            self.line = self.line.wrapping_add(LINE);
            self.left -= 1;
        }
    }

    /// Whether there is one more.
    fn next_run(&mut self) -> bool {
        while let Some(runs) = self.parts.get_mut(self.part) {
            if runs.count > 0 && runs.bytes > 0 {
                runs.count -= 1;
                (self.line, self.left) = (runs.start, runs.bytes.div_ceil(LINE));
                runs.start = runs.start.wrapping_add(runs.stride);
                return true;
            }
            self.part += 1;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_in_order_from_some_way_on() {
        let runs =
            |start: usize, bytes, stride, count| Runs { start: start as *const u8, bytes, stride, count };
        let skipped = AHEAD / LINE;
        let this = [runs(0, (skipped - 1) * LINE, 0, 1), runs(1 << 20, 2 * LINE, 4096, 2)];
        let next = [runs(2 << 20, LINE, 0, 1), Runs::NONE];
        let mut ahead = Ahead::new(this, next);
        let mut lines = Vec::new();
        while ahead.left > 0 || ahead.next_run() {
            lines.push(ahead.line as usize);
            ahead.ask();
        }
        assert_eq!(lines, [(1 << 20) + LINE, (1 << 20) + 4096, (1 << 20) + 4096 + LINE, 2 << 20]);
        ahead.ask();
        Ahead::none().ask();
        assert!(!Ahead::new([Runs::NONE; 2], next).next_run(), "all were skipped");
    }
}
