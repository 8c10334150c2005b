//! A list that grows without moving what it has.

use std::ops::{Index, IndexMut};

/// How many values lie side by side: no more than these are ever room for nothing.
const PAGE: usize = 128;

/// Values by number, from 0 on.
pub struct Pages<T> {
    /// All are full but the last.
    pages: Vec<Vec<T>>,
}

impl<T> Default for Pages<T> {
    fn default() -> Self {
        Self { pages: Vec::new() }
    }
}

impl<T> Pages<T> {
    pub fn len(&self) -> u32 {
        let full = self.pages.len().saturating_sub(1) * PAGE;
        (full + self.pages.last().map_or(0, Vec::len)) as u32
    }

    /// Adds a value; its number.
    pub fn push(&mut self, value: T) -> u32 {
        let number = self.len();
        match self.pages.last_mut().filter(|page| page.len() < PAGE) {
            Some(page) => page.push(value),
            None => {
                let mut page = Vec::with_capacity(PAGE);
                page.push(value);
                self.pages.push(page);
            }
        }
        number
    }

    pub fn get(&self, number: u32) -> Option<&T> {
        let page = self.pages.get(number as usize / PAGE)?;
        page.get(number as usize % PAGE)
    }

    pub fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        let page = self.pages.get_mut(number as usize / PAGE)?;
        page.get_mut(number as usize % PAGE)
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.pages.iter().flatten()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.pages.iter_mut().flatten()
    }
}

impl<T> Index<u32> for Pages<T> {
    type Output = T;

    fn index(&self, number: u32) -> &T {
        &self.pages[number as usize / PAGE][number as usize % PAGE]
    }
}

impl<T> IndexMut<u32> for Pages<T> {
    fn index_mut(&mut self, number: u32) -> &mut T {
        &mut self.pages[number as usize / PAGE][number as usize % PAGE]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_on_from_page_to_page() {
        let mut pages = Pages::default();
        let count = 3 * PAGE as u32;
        for number in 0..count {
            assert_eq!((pages.len(), pages.push(number * 2)), (number, number));
        }
        pages[PAGE as u32] = 7;
        assert_eq!(pages.get(PAGE as u32 - 1), Some(&(2 * (PAGE as u32 - 1))));
        assert_eq!((pages[PAGE as u32], pages.get_mut(count)), (7, None));
        assert_eq!(pages.iter().count() as u32, pages.len());
    }
}
