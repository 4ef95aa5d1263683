//! A terminal that is redrawn again and again, and left as it was found.
//!
//! The alternate screen of xterm's control sequences, which every terminal of
//! today knows: what was on the terminal before is there again afterwards.

use std::io::{self, Write};

/// Draws on a terminal; on anything else it prints one picture below the other.
pub struct Screen<W: Write> {
    out: W,
    is_terminal: bool,
    drawn: bool,
}

impl<W: Write> Screen<W> {
    /// Nothing is written until the first picture.
    pub fn new(out: W, is_terminal: bool) -> Self {
        Self { out, is_terminal, drawn: false }
    }

    /// Draws a picture in place of the last one.
    pub fn draw(&mut self, picture: &str) -> io::Result<()> {
        if !self.is_terminal {
            let gap = if self.drawn { "\n" } else { "" };
            self.drawn = true;
            write!(self.out, "{gap}{picture}")?;
            return self.out.flush();
        }
        if !self.drawn {
            self.drawn = true;
            // The alternate screen, without a cursor.
            write!(self.out, "\x1b[?1049h\x1b[?25l")?;
        }
        // Home; each line overwrites the old one and erases its rest, then what is left below: no flicker.
        write!(self.out, "\x1b[H")?;
        for line in picture.lines() {
            write!(self.out, "{line}\x1b[K\r\n")?;
        }
        write!(self.out, "\x1b[J")?;
        self.out.flush()
    }
}

impl<W: Write> Drop for Screen<W> {
    fn drop(&mut self) {
        if self.is_terminal && self.drawn {
            // There may be nobody to see it any more.
            let _ = write!(self.out, "\x1b[?25h\x1b[?1049l").and_then(|()| self.out.flush());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(is_terminal: bool, pictures: &[&str]) -> String {
        let mut out = Vec::new();
        let mut screen = Screen::new(&mut out, is_terminal);
        for picture in pictures {
            screen.draw(picture).unwrap();
        }
        drop(screen);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_terminal_is_left_as_it_was_found() {
        let text = drawn(true, &["a\nb\n", "c\n"]);
        assert!(
            text.starts_with("\x1b[?1049h\x1b[?25l\x1b[Ha\x1b[K\r\nb\x1b[K\r\n\x1b[J\x1b[Hc\x1b[K\r\n"),
            "{text:?}"
        );
        assert!(text.ends_with("\x1b[?25h\x1b[?1049l"), "{text:?}");
        assert_eq!(text.matches("\x1b[?1049h").count(), 1);
        assert_eq!(drawn(true, &[]), "");
    }

    #[test]
    fn a_pipe_gets_the_pictures_alone() {
        assert_eq!(drawn(false, &["a\n", "b\n"]), "a\n\nb\n");
    }
}
