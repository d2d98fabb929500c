//! Stop strings: ending a text where one of some strings first appears, however it is cut into pieces.
//!
//! A stop string may be spread over several tokens, or begin in the middle of one. Text that may turn out to be the
//! beginning of a stop string is held back; everything else goes out at once, in order, each character exactly once.

/// Watches a stream of text for stop strings.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text that came and is not out: always a proper prefix of some stop string.
    held: String,
    found: Option<usize>,
}

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Checked {
    /// Text that is certain and goes out now.
    pub text: String,
    /// The stop string that ended the text, by its place in the list. What follows it is dropped.
    pub stopped: Option<usize>,
}

impl StopStrings {
    /// A watch for any of `stops`; empty strings never match.
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> Self {
        Self { stops: stops.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// Takes the next piece of text.
    ///
    /// The text ends before the stop string that is complete first, reading character by character (of two that are
    /// complete at once, the longer). After that, further text is dropped and the same stop string is reported.
    pub fn push(&mut self, piece: &str) -> Checked {
        if self.found.is_some() {
            return Checked { text: String::new(), stopped: self.found };
        }
        self.held.push_str(piece);
        if let Some((start, stop)) = self.first_match() {
            self.found = Some(stop);
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return Checked { text, stopped: self.found };
        }
        let keep = self.longest_prefix_at_end();
        let rest = self.held.split_off(self.held.len() - keep);
        Checked { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// The text that was held back, at the end of the stream. The watch is then as new.
    pub fn finish(&mut self) -> String {
        self.found = None;
        std::mem::take(&mut self.held)
    }

    /// The text that is held back at this moment.
    pub fn held(&self) -> &str {
        &self.held
    }

    /// The stop strings, in the order given.
    pub fn stops(&self) -> &[String] {
        &self.stops
    }

    /// Where the stop string that ends first begins, and which it is.
    fn first_match(&self) -> Option<(usize, usize)> {
        self.stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(i, stop)| self.held.find(stop.as_str()).map(|start| (start + stop.len(), start, i)))
            .min()
            .map(|(_, start, i)| (start, i))
    }

    /// The length of the longest end of the held text that is a proper prefix of a stop string.
    fn longest_prefix_at_end(&self) -> usize {
        let held = self.held.as_str();
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0).saturating_sub(1);
        let mut from = held.len().saturating_sub(longest);
        while !held.is_char_boundary(from) {
            from += 1;
        }
        held[from..]
            .char_indices()
            .map(|(i, _)| &held[from + i..])
            .find(|end| self.stops.iter().any(|stop| stop.len() > end.len() && stop.starts_with(end)))
            .map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<usize>) {
        let mut watch = StopStrings::new(stops.iter().copied());
        let mut out = Vec::new();
        let mut stopped = None;
        for piece in pieces {
            let checked = watch.push(piece);
            out.push(checked.text);
            stopped = checked.stopped;
        }
        out.push(watch.finish());
        (out, stopped)
    }

    #[test]
    fn cases() {
        for (name, stops, pieces, text, stopped) in [
            ("none", &[][..], &["a", "b"][..], &["a", "b", ""][..], None),
            ("empty never matches", &[""], &["a"], &["a", ""], None),
            ("inside one piece", &["STOP"], &["abSTOPcd"], &["ab", ""], Some(0)),
            ("over three", &["STOP"], &["abS", "TO", "Pcd", "e"], &["ab", "", "", "", ""], Some(0)),
            ("false alarm", &["STOP"], &["abST", "x"], &["ab", "STx", ""], None),
            ("alarm within alarm", &["aab"], &["aa", "aa", "b", "b"], &["", "aa", "", "", ""], Some(0)),
            ("held at the end", &["STOP"], &["abSTO"], &["ab", "STO"], None),
            ("complete first", &["xyzw", "yz"], &["axyzw"], &["ax", ""], Some(1)),
            ("longer of two", &["b", "ab"], &["cab"], &["c", ""], Some(1)),
            ("characters", &["é!"], &["caf", "é", "é", "!"], &["caf", "", "é", "", ""], Some(0)),
            ("at once", &["a"], &["a"], &["", ""], Some(0)),
        ] {
            let (out, found) = run(stops, pieces);
            assert_eq!((out, found), (text.iter().map(|s| s.to_string()).collect(), stopped), "{name}");
        }
    }

    /// Reads character by character and looks for a stop string at every end.
    fn plain(stops: &[String], text: &str) -> (String, bool) {
        let mut seen = String::new();
        for c in text.chars() {
            seen.push(c);
            if let Some(stop) =
                stops.iter().filter(|s| !s.is_empty() && seen.ends_with(s.as_str())).max_by_key(|s| s.len())
            {
                return (seen[..seen.len() - stop.len()].to_owned(), true);
            }
        }
        (seen, false)
    }

    proptest! {
        #[test]
        fn any_cut_of_the_text_gives_the_same(
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            pieces in prop::collection::vec("[abcé]{0,5}", 0..12),
        ) {
            let mut watch = StopStrings::new(stops.clone());
            let mut out = String::new();
            let mut stopped = false;
            for piece in &pieces {
                let checked = watch.push(piece);
                out.push_str(&checked.text);
                stopped = checked.stopped.is_some();
                // What is held is never more than it must be.
                prop_assert!(watch.held().is_empty()
                    || stops.iter().any(|s| s.len() > watch.held().len() && s.starts_with(watch.held())));
            }
            out.push_str(&watch.finish());
            prop_assert_eq!((out, stopped), plain(&stops, &pieces.concat()));
        }
    }
}
