package simtest

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// doors names the only packages that may import a third-party library.
var doors = map[string][]string{
	"github.com/hashicorp/serf":            {"mesh/gossip"},
	"github.com/hashicorp/memberlist":      {"mesh/gossip"},
	"github.com/hashicorp/raft":            {"mesh/election"},
	"github.com/hashicorp/raft-wal":        {"mesh/election"},
	"github.com/quic-go/quic-go":           {"transport/link"},
	"github.com/dgraph-io/badger":          {"mailstore/kv"},
	"github.com/emersion/go-smtp":          {"transport/smtpd", "transport/smtpout", "appliance/demo/outside"},
	"github.com/emersion/go-imap":          {"mailstore/imapd"},
	"github.com/miekg/dns":                 {"appliance/demo/outside"},
	"github.com/BurntSushi/toml":           {"appliance/config"},
	"github.com/prometheus":                {"appliance/web", "appliance/metrics"},
	"github.com/spf13/cobra":               {"appliance/command"},
	"github.com/hashicorp/go-hclog":        {"mesh/election", "mesh/gossip"},
	"github.com/google/btree":              {"mailstore/kv", "mailstore", "transport/queue"},
	"golang.org/x/crypto/argon2":           {"appliance/login"},
	"golang.org/x/text/encoding":           {"mailstore/mime"},
	"testing/synctest":                     {},
	"github.com/google/go-cmp":             {},
	"pgregory.net/rapid":                   {},
	"github.com/rogpeppe/go-internal":      {},
	"github.com/quic-go/quic-go/testutils": {"simtest"},
}

// vocabularies may be imported by every package and import only vocabularies.
var vocabularies = []string{"mesh", "transport", "freebusy"}

// leaves are pure: bytes or values in, values out. Any engine may import one.
var leaves = []string{"mailstore/mime", "transport/dsn", "freebusy/ical"}

// keepers are what an engine may use to keep things.
var keepers = []string{"mailstore/journal", "mailstore/log", "mailstore/kv"}

// pure packages have no I/O, no goroutines and no clock of their own.
var pure = []string{"mesh/domain", "transport/route", "transport/dsn", "mailstore/mime", "freebusy", "freebusy/ical"}

// packageImports returns, for each package folder, the imports of its
// production files.
func packageImports(t *testing.T) map[string][]string {
	t.Helper()
	root, out := "..", map[string][]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != root || d.Name() == "testdata" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		dir, _ := filepath.Rel(root, filepath.Dir(path))
		for _, i := range f.Imports {
			p, _ := strconv.Unquote(i.Path.Value)
			if !slices.Contains(out[dir], p) {
				out[dir] = append(out[dir], p)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// isTestSupport reports whether a package exists only for tests.
func isTestSupport(pkg string) bool {
	base := filepath.Base(pkg)
	return strings.HasSuffix(base, "test") || base == "simfs" || strings.HasPrefix(pkg, "simtest")
}

func TestThirdPartyLibrariesStandBehindOneDoor(t *testing.T) {
	for pkg, imports := range packageImports(t) {
		if isTestSupport(pkg) {
			continue
		}
		for _, imp := range imports {
			for lib, may := range doors {
				if (imp == lib || strings.HasPrefix(imp, lib+"/")) && !slices.Contains(may, pkg) {
					t.Errorf("%s imports %s; only %v may", pkg, imp, may)
				}
			}
		}
	}
}

func TestArrowsNeverPointBack(t *testing.T) {
	for pkg, imports := range packageImports(t) {
		if isTestSupport(pkg) {
			continue
		}
		for _, imp := range imports {
			to, ours := strings.CutPrefix(imp, "posthouse/")
			if !ours {
				continue
			}
			if why := forbidden(pkg, to); why != "" {
				t.Errorf("%s imports %s: %s", pkg, to, why)
			}
		}
	}
}

func forbidden(from, to string) string {
	top := func(p string) string { return strings.SplitN(p, "/", 2)[0] }
	switch {
	case isTestSupport(to):
		return "test support in production code"
	case top(from) == "cmd":
		if top(to) != "appliance" {
			return "cmd imports appliance only"
		}
	case top(from) == "appliance":
		if top(to) == "cmd" {
			return "arrows never point back"
		}
	case top(to) == "appliance" || top(to) == "cmd":
		return "an engine imports nothing of appliance"
	case slices.Contains(vocabularies, from):
		if !slices.Contains(vocabularies, to) {
			return "a vocabulary imports vocabularies only"
		}
	case slices.Contains(vocabularies, to), slices.Contains(leaves, to):
	case slices.Contains(keepers, to):
		if top(from) == "mesh" || slices.Contains(pure, from) {
			return "this package keeps nothing in the message log"
		}
	case from == "mailstore":
		return "mailstore stands on log, kv and journal alone"
	case to == "mailstore" && top(from) == "mailstore":
		if slices.Contains(keepers, from) {
			return "log and view know no mailboxes"
		}
	default:
		return "an engine never imports a sibling engine"
	}
	return ""
}

func TestPurePackagesTouchNothing(t *testing.T) {
	banned := []string{"os", "net", "io/fs", "sync/atomic", "context", "log/slog", "crypto/rand", "math/rand", "math/rand/v2"}
	for pkg, imports := range packageImports(t) {
		if !slices.Contains(pure, pkg) {
			continue
		}
		for _, imp := range imports {
			if slices.Contains(banned, imp) {
				t.Errorf("%s is pure and imports %s", pkg, imp)
			}
		}
	}
}

func TestEveryPackageHasItsCharter(t *testing.T) {
	for pkg := range packageImports(t) {
		files, _ := filepath.Glob(filepath.Join("..", pkg, "*.go"))
		found := false
		for _, name := range files {
			f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments|parser.PackageClauseOnly)
			if err != nil {
				t.Fatal(err)
			}
			found = found || f.Doc != nil && (strings.HasPrefix(f.Doc.Text(), "Package ") || strings.HasPrefix(f.Doc.Text(), "Command "))
		}
		if !found {
			t.Errorf("%s has no package comment", pkg)
		}
	}
}
