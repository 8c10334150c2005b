//! A place in an object that is validated, with its value, and all that can be wrong with that.

use std::fmt::Display;

use serde_json::Value;

use super::names;
use crate::field_error::FieldError;
use crate::place::Place;

/// What is wrong so far.
pub(super) type Errors = Vec<FieldError>;

const PATH_BACKSTEPS: &str = "must not contain '..'";

/// A place.
#[derive(Clone, Copy)]
pub(super) struct At<'p, 'v> {
    place: Place<'p>,
    pub value: &'v Value,
}

impl<'p, 'v> At<'p, 'v> {
    /// A whole object; its fields' paths begin with their names.
    pub fn object(value: &'v Value) -> Self {
        let place = Place::ROOT;
        Self { place, value }
    }

    /// A part of an object that is known by this path.
    pub fn named(path: &'p str, value: &'v Value) -> Self {
        let place = Place::named(path);
        Self { place, value }
    }

    /// A field of a struct; null where it is not set.
    pub fn field<'s>(&'s self, name: &'s str) -> At<'s, 'v> {
        let place = self.place.field(name);
        let value = &self.value[name];
        At { place, value }
    }

    /// The entry of a map with this key; null where there is none.
    pub fn key<'s>(&'s self, key: &'s str) -> At<'s, 'v> {
        let place = self.place.key(key);
        let value = &self.value[key];
        At { place, value }
    }

    /// The same place with a value from elsewhere, for errors that are told of another place than their cause's.
    pub fn showing<'w>(&self, value: &'w Value) -> At<'p, 'w>
    where
        'v: 'w,
    {
        At { value, ..*self }
    }

    /// The items of a list.
    pub fn items<'s>(&'s self) -> impl Iterator<Item = At<'s, 'v>> {
        let items = self.value.as_array().map(Vec::as_slice).unwrap_or_default();
        items.iter().enumerate().map(|(index, value)| {
            let place = self.place.index(index);
            At { place, value }
        })
    }

    /// The entries of a map.
    pub fn entries<'s>(&'s self) -> impl Iterator<Item = (&'v str, At<'s, 'v>)>
    where
        'v: 's,
    {
        let entries = self.value.as_object().into_iter().flatten();
        entries.map(|(key, value)| {
            let place = self.place.key(key);
            (key.as_str(), At { place, value })
        })
    }

    /// How errors name this place.
    pub fn path(&self) -> String {
        self.place.to_string()
    }

    /// Its text; empty where there is none.
    pub fn text(&self) -> &'v str {
        self.value.as_str().unwrap_or_default()
    }

    /// Its number; 0 where there is none.
    pub fn number(&self) -> i64 {
        self.value.as_i64().unwrap_or_default()
    }

    /// How many items or entries it has.
    pub fn len(&self) -> usize {
        match self.value {
            Value::Array(items) => items.len(),
            Value::Object(map) => map.len(),
            _ => 0,
        }
    }

    /// Whether anything is set here.
    pub fn is_set(&self) -> bool {
        !self.value.is_null()
    }

    /// Whether it is set and true.
    pub fn is_true(&self) -> bool {
        *self.value == true
    }

    /// The value breaks a rule.
    pub fn invalid(&self, detail: &str, errors: &mut Errors) {
        errors.push(FieldError::invalid(self.path(), self.value, detail));
    }

    /// The value breaks a rule, and is shown in another form than its own.
    pub fn invalid_as(&self, shown: impl Display, detail: &str, errors: &mut Errors) {
        errors.push(FieldError::invalid(self.path(), shown, detail));
    }

    /// The value may not be set.
    pub fn forbidden(&self, detail: &str, errors: &mut Errors) {
        errors.push(FieldError::forbidden(self.path(), detail));
    }

    /// The value is missing, which has this consequence or reason.
    pub fn missing(&self, detail: &str, errors: &mut Errors) {
        errors.push(FieldError::required(self.path(), detail));
    }

    /// The value stands twice.
    pub fn duplicate(&self, shown: impl Display, errors: &mut Errors) {
        errors.push(FieldError::duplicate(self.path(), shown));
    }

    /// The value is none of those that are known.
    pub fn not_supported(&self, known: &[&str], errors: &mut Errors) {
        errors.push(FieldError::not_supported(self.path(), self.value, known));
    }

    /// The value refers to what there is none of.
    pub fn not_found(&self, detail: &str, errors: &mut Errors) {
        errors.push(FieldError::not_found(self.path(), self.value, detail));
    }

    /// It must be a text that is not empty. True: it is.
    pub fn required(&self, errors: &mut Errors) -> bool {
        if self.text().is_empty() {
            self.missing("", errors);
        }
        !self.text().is_empty()
    }

    /// It must be one of these.
    pub fn one_of(&self, known: &[&str], errors: &mut Errors) {
        if self.required(errors) {
            self.one_of_if_set(known, errors);
        }
    }

    /// If it is set, it must be one of these.
    pub fn one_of_if_set(&self, known: &[&str], errors: &mut Errors) {
        if self.is_set() && !known.contains(&self.text()) {
            self.not_supported(known, errors);
        }
    }

    /// A text that a rule for names holds for.
    pub fn follows(&self, rule: fn(&str) -> Vec<String>, errors: &mut Errors) {
        for message in rule(self.text()) {
            self.invalid_as(Value::from(self.text()), &message, errors);
        }
    }

    /// A text that is empty, or that a rule for names holds for.
    pub fn follows_if_set(&self, rule: fn(&str) -> Vec<String>, errors: &mut Errors) {
        if !self.text().is_empty() {
            self.follows(rule, errors);
        }
    }

    /// A text that must be there, and that a rule for names holds for.
    pub fn required_name(&self, rule: fn(&str) -> Vec<String>, errors: &mut Errors) {
        if self.required(errors) {
            self.follows(rule, errors);
        }
    }

    /// A number of at least 0.
    pub fn non_negative(&self, errors: &mut Errors) {
        if self.number() < 0 {
            self.invalid("must be greater than or equal to 0", errors);
        }
    }

    /// If it is set, a number of at least 1.
    pub fn positive_if_set(&self, errors: &mut Errors) {
        if self.is_set() && self.number() < 1 {
            self.invalid("must be greater than 0", errors);
        }
    }

    /// If it is set, a number from `least` to `most`.
    pub fn between(&self, least: i64, most: i64, errors: &mut Errors) {
        if self.is_set() && !(least..=most).contains(&self.number()) {
            let detail = format!("must be between {least} and {most}, inclusive");
            self.invalid(&detail, errors);
        }
    }

    /// The number of a port.
    pub fn port(&self, errors: &mut Errors) {
        if !(1..=65535).contains(&self.number()) {
            let detail = "must be between 1 and 65535, inclusive";
            self.invalid_as(self.number(), detail, errors);
        }
    }

    /// A port by number or name.
    pub fn port_or_name(&self, errors: &mut Errors) {
        if self.value.is_string() {
            self.follows(names::port_name, errors);
        } else {
            self.port(errors);
        }
    }

    /// A path that stays below where it begins.
    pub fn local_path(&self, errors: &mut Errors) {
        let text = self.text();
        if text.starts_with('/') {
            self.invalid("must be a relative path", errors);
        }
        self.no_backsteps(errors);
    }

    /// A path that never goes up.
    pub fn no_backsteps(&self, errors: &mut Errors) {
        if self.text().split('/').any(|part| part == "..") {
            self.invalid(PATH_BACKSTEPS, errors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_error_names_its_place() {
        let object = json!({"spec": {"list": [{"limits": {"cpu": -1}}]}, "metadata": {}});
        let object = At::object(&object);
        let mut errors = Errors::new();
        for item in object.field("spec").field("list").items() {
            for (_, amount) in item.field("limits").entries() {
                amount.non_negative(&mut errors);
            }
        }
        object.field("metadata").field("name").required(&mut errors);
        let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "spec.list[0].limits[cpu]: Invalid value: -1: must be greater than or equal to 0",
                "metadata.name: Required value",
            ]
        );
    }
}
