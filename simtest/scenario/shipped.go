package scenario

import (
	"embed"
	"fmt"
	"io/fs"
	"strings"
)

//go:embed shipped/*.toml
var shipped embed.FS

// Shipped are the names of the scenarios that ship, in order.
func Shipped() (names []string) {
	files, _ := fs.ReadDir(shipped, "shipped") // embedded: it is there
	for _, f := range files {
		names = append(names, strings.TrimSuffix(f.Name(), ".toml"))
	}
	return names
}

// Open returns the text of a scenario that ships.
func Open(name string) (string, error) {
	text, err := shipped.ReadFile("shipped/" + name + ".toml")
	if err != nil {
		return "", fmt.Errorf("no scenario %q ships; there are %s", name, strings.Join(Shipped(), ", "))
	}
	return string(text), nil
}
