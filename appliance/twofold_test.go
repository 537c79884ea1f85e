package appliance

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestASmallFileIsKeptTwice(t *testing.T) {
	const text = `{"version": 1, "node": "0123456789abcdef"}`
	for _, tt := range []struct {
		name  string
		spoil func(file string) error
		named string // the file that is named as damaged
	}{
		{"both are whole", func(string) error { return nil }, ""},
		{"the file is damaged", func(f string) error { return flip(f, 5) }, "node.json"},
		{"the file is gone", os.Remove, "node.json"},
		{"the file is cut", func(f string) error { return os.Truncate(f, 7) }, "node.json"},
		{"the copy's content is damaged", func(f string) error { return flip(f+copySuffix, 160) }, "node.json.copy"},
		{"the copy's sum is damaged", func(f string) error { return flip(f+copySuffix, 30) }, "node.json.copy"},
		{"the copy's sum of what was before is damaged", func(f string) error { return flip(f+copySuffix, 100) }, "node.json.copy"},
		{"the copy's first line is damaged", func(f string) error { return flip(f+copySuffix, 0) }, "node.json.copy"},
		{"the copy is gone", func(f string) error { return os.Remove(f + copySuffix) }, ""},
		{"a write was cut off between copy and file", func(f string) error { return os.WriteFile(f, []byte("before"), 0o600) }, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "node.json")
			var named string
			files := newTwofold(osFiles{}, func(f Flaw) { named = f.File })
			for _, s := range []string{"before", text} {
				if err := files.Write(file, []byte(s), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := tt.spoil(file); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				got, err := files.Read(file)
				if err != nil || string(got) != text {
					t.Fatalf("read %q, %v", got, err)
				}
				if named != tt.named {
					t.Errorf("named %q, want %q", named, tt.named)
				}
				tt.named, named = "", "" // the first read has made it whole
			}
		})
	}
}

func TestEveryFlippedBitOfASmallFileIsMadeWhole(t *testing.T) {
	file := filepath.Join(t.TempDir(), "node.json")
	mended := 0
	files := newTwofold(osFiles{}, func(Flaw) { mended++ })
	want := []byte(`{"version": 1}`)
	if err := files.Write(file, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{file, file + copySuffix} {
		whole, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 8 * len(whole) {
			b := bytes.Clone(whole)
			b[i/8] ^= 1 << (i % 8)
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
			mended = 0
			if got, flaws, _, err := files.look(file); err != nil || !bytes.Equal(got, want) || len(flaws) != 1 {
				t.Fatalf("%s, bit %d: %q, %v, %v", name, i, got, flaws, err)
			}
		}
		if err := os.WriteFile(name, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// slowFiles takes a while for each write, and the longer the earlier its
// writer came: of two writers who meet the first would write the file last.
type slowFiles struct{ osFiles }

func (f slowFiles) Write(name string, content []byte, mode fs.FileMode) error {
	if time.Sleep(time.Millisecond); bytes.HasSuffix(content, []byte("the first")) && filepath.Ext(name) != copySuffix {
		time.Sleep(time.Minute)
	}
	return f.osFiles.Write(name, content, mode)
}

func TestTwoWritersLeaveBothHalvesOfOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "tls.pem")
		files := newTwofold(slowFiles{}, func(f Flaw) { t.Errorf("mended: %v", f) })
		var writers sync.WaitGroup
		for i, text := range []string{"the first", "the second"} {
			writers.Go(func() {
				time.Sleep(time.Duration(i) * 1500 * time.Microsecond)
				if err := files.Write(file, []byte(text), 0o600); err != nil {
					t.Error(err)
				}
			})
		}
		writers.Wait()
		if got, flaws, mend, err := files.look(file); err != nil || mend || len(flaws) > 0 || string(got) != "the second" {
			t.Errorf("%q, flaws %v, %v", got, flaws, err)
		}
	})
}

func flip(file string, at int) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	b[at] ^= 4
	return os.WriteFile(file, b, 0o600)
}
